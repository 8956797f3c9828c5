"""There is one launcher for a state, and on a host no two that give out the same user ids."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.integration.launcher.program import folder, launcher, refused
from tests.support.uids import own_uid_base
from vtpm.wire.launcher import MAX_INSTANCES

pytestmark = pytest.mark.timeout(60)


def test_second_launcher_is_refused_when_its_run_dir_is_another_and_its_state_the_same(tmp_path: Path) -> None:
    state, other = folder(tmp_path, "state"), folder(tmp_path, "other")
    with launcher("--run-dir", folder(tmp_path, "run"), "--state-dir", state) as first:
        error = refused("--run-dir", other, "--state-dir", state)
        assert f"a launcher already serves {state}, its pid is {first.pid}" in error
        assert list(other.iterdir()) == [], "it did something before it was refused"


def test_second_launcher_is_refused_when_the_run_dir_was_made_anew(tmp_path: Path) -> None:
    state, run = folder(tmp_path, "state"), folder(tmp_path, "run")
    with launcher("--run-dir", run, "--state-dir", state) as first:
        shutil.rmtree(run)
        run.mkdir()
        assert f"its pid is {first.pid}" in refused("--run-dir", run, "--state-dir", state)


def test_next_launcher_serves_when_the_first_was_killed(tmp_path: Path) -> None:
    state = folder(tmp_path, "state")
    with launcher("--run-dir", folder(tmp_path, "run"), "--state-dir", state) as first:
        first.kill()
        first.wait(10)
        with launcher("--run-dir", folder(tmp_path, "other"), "--state-dir", state) as second:
            assert second.poll() is None


def test_second_launcher_of_root_is_refused_when_it_would_give_out_the_same_user_ids(tmp_path: Path) -> None:
    base = own_uid_base()
    places = [
        ("--run-dir", folder(tmp_path, f"run{n}"), "--state-dir", folder(tmp_path, f"state{n}")) for n in range(2)
    ]
    with launcher(*places[0], uid_base=base) as first:
        if os.geteuid() != 0:
            # Instances of an ordinary user are in user namespaces of their own, and have that user's id outside.
            with launcher(*places[1], uid_base=base) as second:
                assert second.poll() is None
            return
        for overlapping in (base, base + MAX_INSTANCES - 1, base - MAX_INSTANCES + 1):
            error = refused(*places[1], uid_base=overlapping)
            assert f"its pid is {first.pid}" in error
            assert "Set uid_base" in error
        for beside in (base + MAX_INSTANCES, base - MAX_INSTANCES):
            with launcher(*places[1], uid_base=beside) as second:
                assert second.poll() is None


def test_user_ids_are_free_again_when_their_launcher_was_killed(tmp_path: Path) -> None:
    base = own_uid_base()
    places = [
        ("--run-dir", folder(tmp_path, f"run{n}"), "--state-dir", folder(tmp_path, f"state{n}")) for n in range(2)
    ]
    with launcher(*places[0], uid_base=base) as first:
        first.kill()
        first.wait(10)
        with launcher(*places[1], uid_base=base) as second:
            assert second.poll() is None
