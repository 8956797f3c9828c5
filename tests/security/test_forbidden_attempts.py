"""Each forbidden thing is tried from inside, by a launcher that is root and by one that is an ordinary
user."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.security.harness import MODES, attempts
from tests.security.probe_target import NUMBERS

REFUSED = {
    "open to read": "EPERM",
    "open to write": "EPERM",
    "list root": "EPERM",
    "stat": "EPERM",
    "isatty": False,
    "private memory": "MemoryError",
    "shared memory": "ENOMEM",
}

KILLED = [
    "socket inet",
    "socket unix",
    "socket netlink",
    "socket in thread",
    "start thread",
    "os.fork",
    "run program",
    "signal everyone",
    "setuid back",
    "tty input",
    "make executable",
    "map executable",
    "x32 call",
    "signal itself",
    *(f"call {name}" for name in NUMBERS),
]

OTHERS: list[dict[str, Any]] = [
    {"name": "nothing"},
    {"name": "raise"},
    {"name": "descriptors"},
    {"name": "many threads"},
    {"name": "memfd"},
    {"name": "memfd", "limits": {"file_bytes": 4096}},
    {"name": "crash"},
    {"name": "abort"},
]

CALLS = [{"name": name} for name in [*REFUSED, *KILLED]] + OTHERS


@functools.cache
def _outcomes(mode: str) -> dict[str, dict[str, Any]]:
    return {str(call): outcome for call, outcome in zip(CALLS, attempts(mode, CALLS), strict=True)}


def _outcome(mode: str, name: str, **more: Any) -> dict[str, Any]:
    outcome = _outcomes(mode)[str({"name": name, **more})]
    assert outcome["failure"] is None, outcome
    return outcome


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REFUSED)
def test_call_is_answered_with_an_error_when_it_asks_for_files_or_memory(mode: str, name: str) -> None:
    outcome = _outcome(mode, name)
    assert (outcome["answer"], outcome["exit"]) == (REFUSED[name], 0), outcome


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", KILLED)
def test_process_is_killed_when_it_makes_a_call_that_is_not_allowed(mode: str, name: str) -> None:
    outcome = _outcome(mode, name)
    assert (outcome["answer"], outcome["signal"], outcome["dumped"]) == (None, "SIGSYS", False), outcome


@pytest.mark.parametrize("mode", MODES)
def test_target_runs_and_its_exit_status_comes_back_when_it_does_nothing_wrong(mode: str) -> None:
    outcome = _outcome(mode, "nothing")
    assert (outcome["answer"], outcome["exit"], outcome["log"]) == ("done", 0, "the log works\n"), outcome


@pytest.mark.parametrize("mode", MODES)
def test_process_ends_with_a_traceback_when_the_target_raises(mode: str) -> None:
    outcome = _outcome(mode, "raise")
    assert outcome["exit"] == 1
    assert "RuntimeError: a fault of the target's" in outcome["log"], outcome


@pytest.mark.parametrize("mode", MODES)
def test_descriptors_run_out_when_the_limit_is_reached(mode: str) -> None:
    # 64 in all; 0, 1, 2, hold and link are taken.
    assert _outcome(mode, "descriptors")["answer"] == [59, "EMFILE"]


@pytest.mark.parametrize("mode", MODES)
def test_threads_run_out_when_the_limit_is_reached(mode: str) -> None:
    # 16 in all, one of which is the first.
    assert _outcome(mode, "many threads")["answer"] == [15, "can't start new thread"]


@pytest.mark.parametrize("mode", MODES)
def test_memfd_takes_no_byte_when_no_file_bytes_are_granted(mode: str) -> None:
    assert _outcome(mode, "memfd")["answer"] == ["EFBIG"] * 4


@pytest.mark.parametrize("mode", MODES)
def test_memfd_takes_bytes_up_to_the_limit_when_some_are_granted(mode: str) -> None:
    assert _outcome(mode, "memfd", limits={"file_bytes": 4096})["answer"] == [
        "done",
        "done",
        "EFBIG",
        "EFBIG",
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["crash", "abort"])
def test_no_core_is_dumped_when_the_process_crashes(mode: str, name: str) -> None:
    outcome = _outcome(mode, name)
    assert outcome["signal"] in {"SIGSEGV", "SIGABRT"}, outcome
    assert not outcome["dumped"]


@pytest.mark.parametrize("mode", MODES)
def test_report_says_what_is_weaker_when_an_ordinary_user_starts_it(mode: str) -> None:
    weaker = {step for step, status in _outcome(mode, "nothing")["report"].items() if status != "in_force"}
    assert weaker == ({"identity", "dumpable"} if mode == "user" else set())
