"""What spawn and the confinement program refuse, and that nothing is left behind when they do."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.security.harness import TIMEOUT_S, make_spec, started
from vtpm.confine import spawn as spawn_module
from vtpm.confine.spawn import spawn, wait_confined
from vtpm.confine.spec import UserNamespace, encode_spec
from vtpm.errors import ConfinementError


def _open_descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def _children() -> set[str]:
    """Process ids of this process's children, those that have ended and were not reaped among them."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.mark.parametrize(
    ("encoded", "what"),
    [
        (b"", "ended before it gave"),
        (b"{}", "lacks fields"),
        (b"not json", "not JSON"),
        (encode_spec(make_spec("nothing")).replace(b'"uid"', b'"unknown": 1, "uid"'), "unknown fields: unknown"),
        (encode_spec(make_spec("nothing")).replace(b'"import_paths": ["/', b'"import_paths": ["./'), "import_paths"),
    ],
)  # fmt: skip
def test_process_ends_with_a_clear_error_when_its_spec_is_malformed(
    encoded: bytes, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawn_module, "encode_spec", lambda _spec: encoded)
    with started(make_spec("nothing")) as probe:
        with pytest.raises(ConfinementError, match=what):
            wait_confined(probe.process, timeout_s=TIMEOUT_S)
        assert probe.wait().si_status == ConfinementError.exit_status
        assert what in probe.log()


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("no_such_module:prepare", "No module named 'no_such_module'"),
        ("probe_target:no_such_function", "no_such_function"),
    ],
)
def test_confinement_is_refused_when_the_target_cannot_be_imported(target: str, what: str) -> None:
    with started(make_spec("nothing", target=target)) as probe:
        with pytest.raises(ConfinementError, match=f"failed at step import: .*{what}"):
            wait_confined(probe.process, timeout_s=TIMEOUT_S)
        assert probe.wait().si_status == ConfinementError.exit_status


def test_error_says_that_the_process_died_when_prepare_raises() -> None:
    with (
        started(make_spec("no such attempt")) as probe,
        pytest.raises(ConfinementError, match="ended before it was confined"),
    ):
        wait_confined(probe.process, timeout_s=TIMEOUT_S)


def test_spawn_refuses_when_fds_are_not_those_of_the_spec() -> None:
    before = _open_descriptors()
    with pytest.raises(ConfinementError, match=r"descriptors for probe are \[3\]"):
        spawn(make_spec("nothing"), fds={3: 0}, log_fd=2)
    assert _open_descriptors() == before


def test_spawn_refuses_when_an_import_path_is_not_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(ConfinementError, match=f"{missing} of probe is no folder"):
        spawn(replace(make_spec("nothing"), import_paths=(missing,)), fds={3: 0, 4: 0}, log_fd=2)


def test_spawn_refuses_when_the_user_namespace_does_not_fit_the_user() -> None:
    spec = make_spec("nothing")
    kinds = set(UserNamespace) - {spec.user_namespace}
    (other,) = kinds
    with pytest.raises(ConfinementError, match="probe"):
        spawn(replace(spec, user_namespace=other), fds={3: 0, 4: 0}, log_fd=2)


def test_nothing_is_left_when_the_kernel_refuses_the_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    # CLONE_FS together with a mount namespace is EINVAL.
    monkeypatch.setitem(spawn_module.CLONE_NEW, "net", 0x200)
    before, children = _open_descriptors(), _children()
    with pytest.raises(ConfinementError, match="no process could be made in new namespaces: Invalid argument"):
        spawn(make_spec("nothing"), fds={3: 0, 4: 0}, log_fd=2)
    assert _open_descriptors() == before
    assert _children() == children


def test_nothing_is_left_when_it_cannot_be_placed() -> None:
    def place(pid: int) -> None:
        assert Path(f"/proc/{pid}").exists()
        raise OSError("no such control group")

    before, children = _open_descriptors(), _children()
    with pytest.raises(ConfinementError, match="no such control group"):
        spawn(make_spec("nothing"), fds={3: 0, 4: 0}, log_fd=2, place=place)
    assert _open_descriptors() == before
    assert _children() == children


def test_error_is_reported_when_the_interpreter_cannot_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_base_executable", "/nonexistent/python")
    with (
        started(make_spec("nothing")) as probe,
        pytest.raises(ConfinementError, match=r"confinement program could not be started: .*No such file"),
    ):
        wait_confined(probe.process, timeout_s=TIMEOUT_S)


def test_wait_gives_up_when_time_is_up() -> None:
    with started(make_spec("nothing")) as probe, pytest.raises(ConfinementError, match="not confined within 0"):
        wait_confined(probe.process, timeout_s=0)


def test_process_is_named_for_ever_when_it_is_started() -> None:
    with started(make_spec("hold")) as probe:
        wait_confined(probe.process, timeout_s=TIMEOUT_S)
        stat = Path(f"/proc/{probe.process.pid}/stat").read_text()
        assert int(stat.rpartition(")")[2].split()[19]) == probe.process.start_time_ticks
        assert f"Pid:\t{probe.process.pid}\n" in Path(f"/proc/self/fdinfo/{probe.process.pidfd}").read_text()
        assert not os.get_inheritable(probe.process.pidfd)


def test_launcher_is_undisturbed_when_it_spawns() -> None:
    before = _open_descriptors()
    with started(make_spec("nothing")) as probe:
        wait_confined(probe.process, timeout_s=TIMEOUT_S)
        probe.wait()
    assert _open_descriptors() == before
