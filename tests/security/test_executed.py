"""A program that is executed in confinement: what it sees of the host, and what it cannot do."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.security.harness import MODES, attempts
from vtpm.confine import execute
from vtpm.confine.spec import AllowList

FOLDERS = [path for path in ("/usr", "/lib", "/lib64", "/bin") if os.path.lexists(path)]


def call(script: str, *, proc: bool = True, path: str = "/usr/bin/bash") -> dict[str, Any]:
    return {
        "name": "",
        "target": execute.TARGET,
        "program": "vtpm-vm",
        "allow_list": AllowList.OWN,
        "root": {"read_only": [*FOLDERS, "/dev/null"], "proc": proc},
        "target_args": {"path": path, "arguments": ["-c", f"{script}; echo 1 >&4"]},
    }


@pytest.mark.parametrize("mode", MODES)
def test_program_sees_nothing_but_what_it_was_given_when_it_is_executed(mode: str) -> None:
    (outcome,) = attempts(mode, [call("echo /*; echo /dev/*; echo $$")])
    assert outcome["failure"] is None and outcome["answer"] == 1, outcome
    tops = sorted([*FOLDERS, "/dev", "/proc"])
    assert outcome["log"].splitlines() == [" ".join(tops), "/dev/null", "1"]


@pytest.mark.parametrize("mode", MODES)
def test_program_sees_no_process_files_when_it_was_given_none(mode: str) -> None:
    (outcome,) = attempts(mode, [call("echo /*", proc=False)])
    assert outcome["log"].split() == sorted([*FOLDERS, "/dev"])


@pytest.mark.parametrize("mode", MODES)
def test_program_changes_no_file_when_it_is_executed(mode: str) -> None:
    places = ("/x", "/usr/x", "/usr/bin/x", "/dev/x", "/proc/x", "/proc/sys/kernel/hostname")
    script = "; ".join(f"(echo 1 > {place}) 2> /dev/null && echo {place}" for place in places)
    (outcome,) = attempts(mode, [call(script)])
    assert outcome["answer"] == 1 and outcome["log"] == "", outcome


@pytest.mark.parametrize("mode", MODES)
def test_program_has_no_capability_and_gains_none_when_it_is_executed(mode: str) -> None:
    (outcome,) = attempts(mode, [call("grep -E '^(Cap|NoNewPrivs|Groups)' /proc/self/status")])
    fields = dict(line.split(":\t") for line in outcome["log"].splitlines())
    assert fields.pop("NoNewPrivs") == "1"
    if mode == "root":
        assert fields.pop("Groups").strip() == ""
    fields.pop("Groups", None)
    assert set(fields.values()) == {"0" * 16}, fields


@pytest.mark.parametrize("mode", MODES)
def test_program_is_not_called_filtered_when_it_only_promised_a_filter(mode: str) -> None:
    (outcome,) = attempts(mode, [call("true")])
    assert outcome["report"]["seccomp"] == "weaker"


@pytest.mark.parametrize("mode", MODES)
def test_confinement_fails_when_the_program_is_not_there(mode: str) -> None:
    (outcome,) = attempts(mode, [call("true", path="/usr/bin/there-is-none")])
    assert "/usr/bin/there-is-none cannot be executed" in outcome["failure"]


@pytest.mark.parametrize("mode", MODES)
def test_confinement_fails_when_what_it_is_to_see_is_not_there(mode: str) -> None:
    wanting = call("true")
    wanting["root"]["read_only"].append("/there-is-none")
    (outcome,) = attempts(mode, [wanting])
    assert "step root" in outcome["failure"] and outcome["answer"] is None
