"""Each layer by itself: what still stands, and what falls, when another one is left out; a missing step is
refused."""

from __future__ import annotations

import os

import pytest

from tests.security.harness import (
    MODES,
    TIMEOUT_S,
    attempt,
    attempts,
    has_ended,
    live,
    make_spec,
    started,
    weakened,
)
from vtpm.confine.spawn import wait_confined
from vtpm.errors import ConfinementError

SECCOMP = ["seccomp"]


def _one(mode: str, name: str, without: list[str]) -> object:
    (outcome,) = attempts(mode, [{"name": name, "without": without}])
    assert outcome["failure"] is None, outcome
    return outcome["answer"]


@pytest.mark.parametrize("mode", MODES)
def test_there_is_no_file_when_seccomp_is_left_out(mode: str) -> None:
    assert _one(mode, "open to read", SECCOMP) == "ENOENT"
    assert _one(mode, "open to write", SECCOMP) == "EROFS"


@pytest.mark.parametrize("mode", MODES)
def test_files_can_be_read_when_seccomp_and_root_are_left_out(mode: str) -> None:
    assert _one(mode, "open to read", ["seccomp", "root"]) == "done"


@pytest.mark.parametrize("mode", MODES)
def test_no_interface_is_up_when_seccomp_is_left_out(mode: str) -> None:
    assert _one(mode, "interfaces", SECCOMP) == []


@pytest.mark.parametrize("mode", MODES)
def test_there_is_nobody_to_signal_when_seccomp_is_left_out(mode: str) -> None:
    assert _one(mode, "signal everyone", SECCOMP) == "ESRCH"


@pytest.mark.parametrize("mode", MODES)
def test_privileged_calls_fail_when_seccomp_is_left_out(mode: str) -> None:
    calls = ["mount", "unshare", "chroot", "bpf", "init_module", "perf_event_open"]
    outcomes = attempts(mode, [{"name": f"call {name}", "without": SECCOMP} for name in calls])
    answers = dict(zip(calls, (outcome["answer"] for outcome in outcomes), strict=True))
    assert "done" not in (answers[name] for name in calls if name != "unshare"), answers


@pytest.mark.parametrize("mode", MODES)
def test_memory_is_bounded_by_nothing_when_rlimits_are_left_out(mode: str) -> None:
    assert _one(mode, "shared memory", ["rlimits"]) == "done"


@pytest.mark.parametrize("mode", MODES)
def test_process_cannot_be_dumped_when_seccomp_is_left_out(mode: str) -> None:
    assert _one(mode, "dumpable", SECCOMP) == 0


def test_process_can_be_dumped_when_the_dumpable_step_is_left_out() -> None:
    # As root the uid change has the same effect, so an ordinary user's launcher it is.
    assert _one("user", "dumpable", ["seccomp", "dumpable"]) == 1


@pytest.mark.parametrize(
    ("namespaces", "without", "step"),
    [
        (["net"], [], "namespaces"),
        (["pid"], [], "namespaces"),
        (["mnt"], [], "namespaces"),
        (["net"], ["namespaces"], "network"),
    ],
)
def test_confinement_is_refused_when_a_namespace_is_shared(
    namespaces: list[str], without: list[str], step: str
) -> None:
    with weakened(without, namespaces), started(make_spec("nothing")) as probe:
        with pytest.raises(ConfinementError, match=f"failed at step {step}"):
            wait_confined(probe.process, timeout_s=TIMEOUT_S)
        assert probe.wait().si_status == ConfinementError.exit_status


def test_confinement_is_refused_when_no_new_privs_is_left_out() -> None:
    outcome = attempt("nothing", without=["no_new_privs"])
    assert "failed at step seccomp" in str(outcome["failure"])
    assert outcome["exit"] == ConfinementError.exit_status


@pytest.mark.parametrize("mode", MODES)
def test_process_dies_when_its_launcher_is_killed(mode: str) -> None:
    with live(mode, "ignore hold") as probe:
        probe.launcher.kill()
        assert has_ended(probe.pidfd, TIMEOUT_S)


def test_process_outlives_its_launcher_when_the_parent_step_is_left_out() -> None:
    with live(MODES[0], "ignore hold", without=["parent"]) as probe:
        probe.launcher.kill()
        probe.launcher.wait(TIMEOUT_S)
        assert not has_ended(probe.pidfd, 0.3)


def test_process_ends_when_the_hold_is_closed() -> None:
    with started(make_spec("hold")) as probe:
        wait_confined(probe.process, timeout_s=TIMEOUT_S)
        probe.hold.close()
        assert probe.wait().si_status == 0


def test_confinement_is_refused_when_the_launcher_is_gone_already() -> None:
    with started(make_spec("nothing")) as probe:
        probe.hold.close()
        with pytest.raises(ConfinementError, match=r"failed at step parent: .* hold descriptor is closed"):
            wait_confined(probe.process, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize(("path", "what"), [("/", "is a folder"), ("/etc/hostname", "is a file with a name")])
def test_confinement_is_refused_when_a_descriptor_leads_to_files(path: str, what: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        with (
            started(make_spec("nothing", keep_fds=(3, 4, 9)), fds={9: fd}) as probe,
            pytest.raises(ConfinementError, match=f"failed at step descriptors: descriptor 9 {what}"),
        ):
            wait_confined(probe.process, timeout_s=TIMEOUT_S)
    finally:
        os.close(fd)
