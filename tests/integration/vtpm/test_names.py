"""A name that is no name is refused as one, whatever is asked of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.host import Host
from vtpm.errors import NotFoundError, UsageError, VtpmError


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "", "x" * 64, "-a", "a b", "a\n", "é", "a/start"])
@pytest.mark.parametrize("what", ["create", "show", "start", "stop", "delete"])
def test_name_is_refused_as_a_name_when_it_is_none(host: Host, name: str, what: str) -> None:
    with host.client() as client:
        with pytest.raises(VtpmError) as refusal:
            getattr(client, what)(name)
        assert isinstance(refusal.value, UsageError)
        assert client.list() == []
    assert not list((host.run_dir / "guests").iterdir())


def test_command_line_names_object_cause_and_next_step(host: Host) -> None:
    done = host.cli("show", "../x", check=False)
    assert done.returncode == UsageError.exit_status
    assert "'../x' is not a name for a vTPM" in done.stderr
    assert "Use 1 to 63 letters" in done.stderr
    assert host.cli("show", "web9", check=False).returncode == NotFoundError.exit_status
