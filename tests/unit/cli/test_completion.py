"""Shell completion: scripts for three shells; in a real bash commands, options and the manager's names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.cli.conftest import TIMEOUT_S, Cli
from tests.unit.client.canned_manager import STOPPED, CannedManager

COMPLETE = """
set -eu
source <(vtpm completion bash)
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_vtpm_completion vtpm
printf '%s\\n' "${COMPREPLY[@]}"
"""


def complete(*words: str) -> set[str]:
    """Return what bash offers for the last of the words."""
    scripts = Path(sys.executable).parent
    result = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", *words],
        env={**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.stderr == ""
    return set(result.stdout.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_names_the_command_when_the_shell_is_known(cli: Cli, shell: str) -> None:
    ended = cli("completion", shell)
    assert (ended.status, ended.err) == (0, "")
    assert f"_VTPM_COMPLETE={shell}_complete" in ended.out
    assert json.loads(cli("completion", shell, "--json").out)["script"] + "\n" == ended.out


def test_commands_are_offered_when_one_is_begun(manager: CannedManager) -> None:
    assert complete("vtpm", "st") == {"status", "start", "stop"}


def test_names_are_offered_from_the_manager_when_a_name_is_begun(manager: CannedManager) -> None:
    manager.vtpms["web2"] = replace(STOPPED, name="web2")
    manager.vtpms["db"] = replace(STOPPED, name="db")
    assert complete("vtpm", "show", "we") == {"web1", "web2"}
    assert complete("vtpm", "--json", "start", "") == {"web1", "web2", "db"}


def test_names_are_offered_from_the_named_socket_when_there_is_one(
    manager: CannedManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTPM_SOCKET", "/nonexistent")
    assert complete("vtpm", "--socket", str(manager.socket_path), "stop", "w") == {"web1"}


def test_values_are_offered_when_an_option_has_a_few(manager: CannedManager) -> None:
    assert complete("vtpm", "create", "x", "--domain", "") == {"process", "qemu", "xen"}


def test_nothing_is_offered_and_nothing_said_when_no_manager_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTPM_SOCKET", str(tmp_path / "absent"))
    assert complete("vtpm", "show", "w") == set()
