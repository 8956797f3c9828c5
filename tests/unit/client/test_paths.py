"""Default places: the system's for root, XDG's for users, an error rather than a shared directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from vtpm.client.manager_client import default_socket
from vtpm.errors import UsageError
from vtpm.wire.paths import default_cache_dir, default_image_dir, default_run_dir, default_state_dir

XDG = {"XDG_RUNTIME_DIR": "/run/user/1000", "XDG_STATE_HOME": "/home/u/state", "HOME": "/home/u"}


def test_root_has_the_systems_directories_when_xdg_is_set_too() -> None:
    assert default_run_dir(0, XDG) == Path("/run/vtpm")
    assert default_state_dir(0, XDG) == Path("/var/lib/vtpm")


def test_a_user_has_xdg_directories_when_they_are_set() -> None:
    assert default_run_dir(1000, XDG) == Path("/run/user/1000/vtpm")
    assert default_state_dir(1000, XDG) == Path("/home/u/state/vtpm")


@pytest.mark.parametrize("state_home", [{}, {"XDG_STATE_HOME": ""}, {"XDG_STATE_HOME": "relative"}])
def test_state_is_below_home_when_no_state_home_is_usable(state_home: dict[str, str]) -> None:
    assert default_state_dir(1000, {"HOME": "/home/u", **state_home}) == Path("/home/u/.local/state/vtpm")


@pytest.mark.parametrize("environ", [{}, {"XDG_RUNTIME_DIR": ""}, {"XDG_RUNTIME_DIR": "run"}])
def test_a_user_gets_an_error_with_a_next_step_when_no_runtime_directory_is_usable(environ: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="XDG_RUNTIME_DIR") as caught:
        default_run_dir(1000, environ)
    assert "--socket" in caught.value.next_step


def test_images_and_cache_are_where_each_kind_of_user_has_such() -> None:
    environ = {"HOME": "/home/u", "XDG_CACHE_HOME": "/c", "XDG_DATA_HOME": "relative"}
    assert default_image_dir(0, environ) == Path("/var/lib/vtpm/images")
    assert default_cache_dir(0, environ) == Path("/var/cache/vtpm")
    assert default_image_dir(1000, environ) == Path("/home/u/.local/share/vtpm/images")
    assert default_cache_dir(1000, environ) == Path("/c/vtpm")


@pytest.mark.parametrize("place", [default_image_dir, default_cache_dir, default_state_dir])
def test_a_user_is_told_how_to_name_the_place_when_there_is_no_home_at_all(
    place: Callable[[int, Mapping[str, str]], Path],
) -> None:
    with pytest.raises(UsageError) as raised:
        place(1000, {})
    assert "DIR" in raised.value.next_step


def test_a_user_gets_an_error_when_there_is_no_home() -> None:
    with pytest.raises(UsageError, match="HOME"):
        default_state_dir(1000, {})


def test_the_socket_is_the_named_one_when_the_variable_is_set() -> None:
    assert default_socket(1000, {**XDG, "VTPM_SOCKET": "/x/m.sock"}) == Path("/x/m.sock")
    assert default_socket(1000, {"VTPM_SOCKET": "/x/m.sock"}) == Path("/x/m.sock")


def test_the_socket_is_in_the_run_directory_when_none_is_named() -> None:
    assert default_socket(0, {}) == Path("/run/vtpm/manager.sock")
    assert default_socket(1000, {**XDG, "VTPM_SOCKET": ""}) == Path("/run/user/1000/vtpm/manager.sock")
