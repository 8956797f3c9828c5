"""Every command: what it asks of the manager, what it prints where, and with which status it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from tests.unit.cli.conftest import PROGRAM, TIMEOUT_S, Cli, finish, start_program
from tests.unit.client.canned_manager import (
    IN_USE,
    LOCKED,
    RUNNING,
    STATUS,
    STOPPED,
    VM_UUID,
    CannedManager,
    event,
    to_json,
)
from vtpm import errors
from vtpm.cli.main import cli as command_group
from vtpm.cli.main import main
from vtpm.errors import VtpmError
from vtpm.wire.api import LifeState

EVERY_ERROR = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, VtpmError)]
EVERY_COMMAND = [
    ["status"],
    ["create", "db"],
    ["start", "web1"],
    ["stop", "web1"],
    ["delete", "web1", "--yes"],
    ["list"],
    ["show", "web1"],
    ["events"],
    ["events", "--follow"],
    ["run", "web1", "--", "true"],
    ["policy", "show"],
    ["policy", "predict"],
    ["policy", "allow", "next"],
    ["policy", "drop", "set-up", "--yes"],
    ["recovery-key"],
    ["recover", "--yes", "--key-file", "/dev/null"],
    ["import", "/dev/null", "--recovery-key-file", "/dev/null", "--original-is-dead", "--yes"],
    ["shutdown"],
]


def as_json(value: object) -> Any:
    return json.loads(to_json(value))


def test_the_commands_are_those_of_the_design_when_help_is_asked(cli: Cli) -> None:
    ended = cli("--help")
    assert ended.status == 0
    named = ["status", "create", "start", "stop", "delete", "list", "show", "events", "run", "export", "import"]
    named += [
        "migrate",
        "receive",
        "adopt",
        "peer",
        "platform",
        "authority",
        "policy",
        "recovery-key",
        "recover",
        "image",
        "shutdown",
    ]
    assert list(command_group.commands) == [*named, "completion"]
    assert all(f"\n  {name} " in ended.out for name in named)


def _words() -> list[list[str]]:
    """Every command's words, those of groups among them."""
    return [
        [name, *more]
        for name, command in command_group.commands.items()
        for more in ([[inner] for inner in command.commands] if isinstance(command, click.Group) else [[]])
    ]


@pytest.mark.parametrize("words", _words(), ids=" ".join)
def test_every_command_has_help_and_json_when_asked(cli: Cli, words: list[str]) -> None:
    ended = cli(*words, "--help")
    assert (ended.status, ended.err) == (0, "")
    assert "--json" in ended.out


def test_the_version_is_printed_when_asked(cli: Cli) -> None:
    assert cli("--version").out.startswith("vtpm 0.")


# status


def test_status_says_what_protects_the_root_key_when_it_is_unprotected(cli: Cli) -> None:
    ended = cli("status")
    assert (ended.status, ended.err) == (0, "")
    for text in ("platform TPM  embedded, answers", "PCRs          sha256:0,7", "root key      unprotected"):
        assert text in ended.out
    assert "vtpm-launcher  NO" in ended.out
    assert "WARNING: The root key is UNPROTECTED" in ended.out
    assert "WARNING: the store is nearly full" in ended.out


def test_status_warns_once_when_the_manager_warns_of_an_unprotected_key_itself(
    cli: Cli, manager: CannedManager
) -> None:
    manager.status = replace(STATUS, warnings=["UNPROTECTED: in the manager's words"])
    assert cli("status").out.count("UNPROTECTED") == 1


def test_status_warns_of_nothing_when_a_tpm_seals_the_root_key(cli: Cli, manager: CannedManager) -> None:
    assert STATUS.platform is not None
    sealed = replace(STATUS.platform, kind="hardware", protection="sealed")
    manager.status = replace(STATUS, platform=sealed, warnings=[])
    ended = cli("status")
    assert "root key      sealed" in ended.out
    assert "WARNING" not in ended.out


def test_status_warns_when_the_keeper_does_not_answer(cli: Cli, manager: CannedManager) -> None:
    manager.status = replace(STATUS, platform=None, services=[], confinement=[])
    assert "WARNING: The keeper does not answer" in cli("status").out


def test_status_is_the_managers_object_when_json_is_asked(cli: Cli) -> None:
    ended = cli("status", "--json")
    assert json.loads(ended.out) == as_json(STATUS)
    assert ended.err == ""


# create, start, stop, delete, list, show


def test_create_asks_for_the_defaults_when_only_a_name_is_given(cli: Cli, manager: CannedManager) -> None:
    ended = cli("create", "db")
    assert ended.status == 0
    assert ended.out.startswith("db created: TPM 2.0, uuid ")
    assert ended.err == "Creating db ...\n"
    body = {"name": "db", "tpm_version": "2.0", "domain": "process", "vm_uuid": None, "make": "libtpms"}
    assert manager.asked[0].body == body


def test_create_asks_for_all_it_is_told_when_every_option_is_given(cli: Cli, manager: CannedManager) -> None:
    options = ["--tpm-version", "1.2", "--domain", "qemu", "--make", "swtpm", "--vm-uuid", str(VM_UUID).upper()]
    ended = cli("create", "db", *options, "--json")
    assert json.loads(ended.out) == as_json(manager.vtpms["db"])
    assert ended.err == ""
    expected = {"name": "db", "tpm_version": "1.2", "domain": "qemu", "vm_uuid": str(VM_UUID), "make": "swtpm"}
    assert manager.asked[0].body == expected


@pytest.mark.parametrize(
    ("words", "startup"),
    [([], "none"), (["--startup", "clear"], "clear"), (["--startup", "state"], "state")],
)
def test_start_sends_the_startup_when_it_is_told_to(
    cli: Cli, manager: CannedManager, words: list[str], startup: str
) -> None:
    manager.vtpms["web1"] = STOPPED
    ended = cli("start", "web1", *words)
    assert (ended.status, ended.err) == (0, "Starting web1 ...\n")
    assert f"-T {RUNNING.tcti}\n" in ended.out
    assert f"path={RUNNING.control_socket}\n" in ended.out
    assert manager.asked[0].body == {"startup": startup}


def test_stop_says_the_state_when_it_is_done(cli: Cli, manager: CannedManager) -> None:
    assert cli("stop", "web1").out == "web1 is stopped\n"
    assert json.loads(cli("stop", "web1", "--json").out)["state"] == "stopped"
    assert manager.methods() == ["POST /v1/vtpms/web1/stop"] * 2


def test_delete_asks_nothing_when_told_yes(cli: Cli, manager: CannedManager) -> None:
    ended = cli("delete", "web1", "--yes")
    assert (ended.status, ended.out) == (0, "web1 deleted\n")
    assert manager.methods() == ["DELETE /v1/vtpms/web1"]


def test_delete_prints_an_object_when_json_is_asked(cli: Cli) -> None:
    assert json.loads(cli("delete", "web1", "--yes", "--json").out) == {"deleted": "web1"}


def test_delete_refuses_when_it_can_ask_nobody(cli: Cli, manager: CannedManager) -> None:
    ended = cli("delete", "web1")
    assert (ended.status, ended.out) == (2, "")
    assert ended.err == "error: web1 is kept: there is no terminal to ask on\nnext: Say --yes, if it is meant\n"
    assert "web1" in manager.vtpms


def test_list_is_plain_columns_when_stdout_is_no_terminal(cli: Cli, manager: CannedManager) -> None:
    manager.vtpms = {"web1": IN_USE, "a-long-name": replace(STOPPED, name="a-long-name", vm_uuid=None)}
    lines = cli("list").out.splitlines()
    assert lines[0].split() == ["NAME", "STATE", "TPM", "DOMAIN", "OWNER", "CLIENT", "VM"]
    assert lines[2].split() == f"web1 running 2.0 process root emulator, pid 1234 {VM_UUID}".split()
    assert lines[1].split() == ["a-long-name", "stopped", "2.0", "process", "root", "-", "-"]
    assert all(line.isascii() and line[13] != " " for line in lines)


def test_list_is_an_array_when_json_is_asked(cli: Cli, manager: CannedManager) -> None:
    assert json.loads(cli("list", "--json").out) == [as_json(RUNNING)]
    manager.vtpms = {}
    assert json.loads(cli("list", "--json").out) == []


def test_show_has_every_promised_field_when_json_is_asked(cli: Cli) -> None:
    shown = json.loads(cli("show", "web1", "--json").out)
    promised = "name uuid owner vm_uuid tpm_version domain state epoch version measurement control_socket tcti"
    assert set(promised.split(" ")) <= set(shown)
    assert shown == as_json(RUNNING)


def test_show_says_why_when_a_vtpm_failed(cli: Cli, manager: CannedManager) -> None:
    manager.vtpms["web1"] = replace(STOPPED, state=LifeState.FAILED, reason="the store is full")
    ended = cli("show", "web1")
    assert "state           failed: the store is full\n" in ended.out
    assert f"VM              {VM_UUID}\n" in ended.out


def test_show_says_since_when_and_what_to_do_when_a_tpm_is_locked(cli: Cli, manager: CannedManager) -> None:
    manager.vtpms["web1"] = LOCKED
    shown = cli("show", "web1").out
    assert "LOCKED OUT      since 2026-07-01T11:00:00+00:00: 3 of 3 failed authorisations" in shown
    assert "after 1000 s of power one failure is forgiven" in shown
    assert f"tpm2_dictionarylockout -c -T {LOCKED.tcti}\n" in shown
    told = {"since": "2026-07-01T11:00:00+00:00", "failed_tries": 3, "max_tries": 3, "interval_s": 1000}
    assert json.loads(cli("show", "web1", "--json").out)["lockout"] == told


def test_show_says_nothing_of_lockout_when_a_tpm_is_not_locked(cli: Cli) -> None:
    shown = cli("show", "web1").out
    assert "LOCKED" not in shown and "next" not in shown
    assert json.loads(cli("show", "web1", "--json").out)["lockout"] is None


def test_what_others_wrote_cannot_drive_the_terminal_when_it_is_shown(cli: Cli, manager: CannedManager) -> None:
    nasty = "\x1b[31m[bold]\n\u202e\udcff"
    manager.vtpms = {nasty: replace(STOPPED, name=nasty, state=LifeState.FAILED, reason=nasty)}
    escaped = "\\x1b[31m[bold]\\n\\u202e\\udcff"
    assert escaped in cli("list").out
    manager.fail_with("conflict", nasty, nasty)
    ended = cli("show", "web1")
    assert ended.err == f"error: {escaped}\nnext: {escaped}\n"


# events


def test_events_are_printed_once_each_when_there_are_several_pages(cli: Cli, manager: CannedManager) -> None:
    manager.events = [event(number) for number in range(1, 206)]
    ended = cli("events")
    assert ended.out.splitlines()[0] == "2026-07-01T10:00:00Z  uid=0  vtpm.started  web1  pid=1  by=cli"
    assert len(ended.out.splitlines()) == 205
    lines = cli("events", "--json").out.splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(range(1, 206))


def test_following_events_ends_quietly_with_130_when_interrupted(manager: CannedManager) -> None:
    manager.events = [event(1)]
    program = start_program("events", "--follow", "--json")
    assert program.stdout is not None
    assert json.loads(program.stdout.readline())["id"] == 1
    manager.add_event(event(2))
    assert json.loads(program.stdout.readline())["id"] == 2
    program.send_signal(2)
    ended = finish(program)
    assert (ended.status, ended.out, ended.err.strip()) == (130, "", "")


def test_output_ends_quietly_when_its_reader_has_gone(manager: CannedManager) -> None:
    manager.events = [event(number) for number in range(1, 3000)]
    program = start_program("events")
    assert program.stdout is not None
    program.stdout.readline()
    program.stdout.close()
    with program:
        assert program.wait(TIMEOUT_S) == 1
        assert program.stderr is not None
        assert program.stderr.read() == ""


# shutdown


@pytest.mark.parametrize("words", [[], ["--yes"]])
def test_shutdown_asks_nothing_when_there_is_no_terminal(cli: Cli, manager: CannedManager, words: list[str]) -> None:
    ended = cli("shutdown", *words)
    assert (ended.status, ended.out) == (0, "stopped: web1; the host services end\n")
    assert manager.methods() == ["POST /v1/shutdown"]


def test_shutdown_prints_the_managers_object_when_json_is_asked(cli: Cli) -> None:
    ended = cli("shutdown", "--json")
    assert (json.loads(ended.out), ended.err) == ({"stopped": ["web1"]}, "")


# errors


@pytest.mark.parametrize("kind", EVERY_ERROR)
def test_the_exit_status_is_the_errors_when_the_manager_reports_it(
    cli: Cli, manager: CannedManager, kind: type[VtpmError]
) -> None:
    manager.fail_with(kind.code, "web1 is broken", "Mend it")
    ended = cli("show", "web1")
    assert ended == dataclasses.replace(ended, status=kind.exit_status, out="")
    assert ended.err == "error: web1 is broken\nnext: Mend it\n"
    ended = cli("show", "web1", "--json")
    assert (ended.status, ended.out) == (kind.exit_status, "")
    assert json.loads(ended.err) == {"code": kind.code, "message": "web1 is broken", "next_step": "Mend it"}


@pytest.mark.parametrize("words", EVERY_COMMAND, ids=" ".join)
def test_every_command_reports_on_stderr_alone_when_it_fails(
    cli: Cli, manager: CannedManager, words: list[str]
) -> None:
    manager.fail_with("store", "the store is full", "")
    ended = cli(*words)
    assert (ended.status, ended.out) == (9, "")
    assert ended.err.endswith("error: the store is full\n")
    before_dashes = words.index("--") if "--" in words else len(words)
    ended = cli(*words[:before_dashes], "--json", *words[before_dashes:])
    assert (ended.status, ended.out) == (9, "")
    assert json.loads(ended.err) == {"code": "store", "message": "the store is full", "next_step": ""}


@pytest.mark.parametrize("words", EVERY_COMMAND, ids=" ".join)
def test_every_command_names_the_socket_when_no_manager_is_there(cli: Cli, tmp_path: Path, words: list[str]) -> None:
    ended = cli("--socket", str(tmp_path / "absent"), "--json", *words)
    assert (ended.status, ended.out) == (6, "")
    report = json.loads(ended.err)
    assert report["message"] == f"no manager answers at {tmp_path}/absent: No such file or directory"
    assert "systemctl start vtpm-managerd" in report["next_step"]


def test_the_error_says_what_to_set_when_a_user_has_no_runtime_directory(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VTPM_SOCKET", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["list"]) == 2
    assert "XDG_RUNTIME_DIR" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message", "next_step"),
    [
        (["bogus"], "No such command 'bogus'", "See vtpm --help"),
        (["create"], "Missing argument 'NAME'", "See vtpm create --help"),
        (["create", "x", "--tpm-version", "3"], "'3' is not one of '1.2', '2.0'", "See vtpm create --help"),
        (["create", "x", "--vm-uuid", "y"], "'y' is not a valid UUID", "See vtpm create --help"),
        (["start", "x", "--startup", "none"], "'none' is not one of", "See vtpm start --help"),
        (["migrate", "x"], "needs one of --to, --status, --abort", "See vtpm migrate --help"),
        (["migrate", "x", "--to", "b", "--abort"], "needs one of", "See vtpm migrate --help"),
        (["migrate", "--to", "b"], "which vTPM? give its name", ""),
        (["adopt", "x"], "Missing option '--source-is-lost'", "See vtpm adopt --help"),
        (["run", "x"], "Missing argument", "See vtpm run --help"),
        (["list", "--bogus"], "No such option '--bogus'", "See vtpm list --help"),
        (["show", ""], "the name of a vTPM is empty", ""),
    ],
)
def test_the_status_is_2_and_nothing_is_asked_when_the_words_are_wrong(
    cli: Cli, manager: CannedManager, words: list[str], message: str, next_step: str
) -> None:
    ended = cli(*words)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert message in ended.err
    ended = cli("--json", *words)
    report = json.loads(ended.err)
    assert (ended.status, ended.out, report["code"]) == (2, "", "usage")
    assert message in report["message"]
    assert report["next_step"] == next_step
    assert manager.asked == []


def test_a_name_reaches_the_manager_as_a_name_when_it_looks_like_a_path(cli: Cli, manager: CannedManager) -> None:
    ended = cli("show", "../x")
    assert ended.status == 3
    assert "error: there is no vTPM ../x\n" in ended.err
    assert manager.methods() == ["GET /v1/vtpms/%2E%2E%2Fx"]


# as a program


def test_help_and_errors_need_no_slow_import_when_nothing_is_asked_of_the_manager() -> None:
    script = (
        "import sys, vtpm.cli.main as m; m.main(['--help']); m.main(['migrate', 'a']);"
        "sys.exit(sum(name in sys.modules for name in ('httpx', 'rich', 'fastapi', 'asyncio')))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=TIMEOUT_S)
    assert result.returncode == 0


def test_the_status_is_the_programs_when_it_runs_by_itself(manager: CannedManager) -> None:
    result = subprocess.run([*PROGRAM, "show", "none"], capture_output=True, timeout=TIMEOUT_S, text=True)
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr == "error: there is no vTPM none\nnext: See vtpm list\n"
