"""vtpm run: the vTPM as it was found, the command's own status and terminal, signals passed on; and a real QEMU."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.cli.conftest import TIMEOUT_S, finish, on_terminal, start_program
from tests.unit.client.canned_manager import IN_USE, RUNNING, STOPPED, VM_UUID, CannedManager
from vtpm.wire.api import Client

START = "POST /v1/vtpms/web1/start"
STOP = "POST /v1/vtpms/web1/stop"
PYTHON = [sys.executable, "-c"]
PRINT_WORDS = [*PYTHON, "import sys, json; print(json.dumps(sys.argv[1:]))"]


def changes(manager: CannedManager) -> list[str]:
    return [asked for asked in manager.methods() if asked.startswith("POST")]


def test_the_vtpm_is_started_and_stopped_again_when_it_was_stopped(manager: CannedManager) -> None:
    manager.vtpms["web1"] = STOPPED
    ended = finish(start_program("run", "web1", "--", *PRINT_WORDS, "--json", "--", "-x"))
    assert ended.status == 0
    words = json.loads(ended.out)
    assert words[:3] == ["--json", "--", "-x"]
    assert words[3:5] == ["-chardev", f"socket,id=vtpm-chr0,path={manager.control_socket}"]
    assert words[-2:] == ["-uuid", str(VM_UUID)]
    assert changes(manager) == [START, STOP]
    assert ended.err == "Starting web1 ...\nStopping web1 ...\n"


def test_the_vtpm_is_left_running_when_it_was_running(manager: CannedManager) -> None:
    ended = finish(start_program("run", "web1", "--", *PRINT_WORDS))
    assert (ended.status, ended.err) == (0, "")
    assert changes(manager) == []


def test_the_command_has_our_input_and_its_status_is_ours_when_it_ends(manager: CannedManager) -> None:
    script = "import sys; print(sys.stdin.read()); sys.exit(7)"
    ended = finish(start_program("run", "web1", "--", *PYTHON, script), "hello")
    assert (ended.status, ended.out) == (7, "hello\n")


def test_a_vtpm_in_use_is_refused_with_who_uses_it_when_it_is_run(manager: CannedManager) -> None:
    manager.vtpms["web1"] = IN_USE
    ended = finish(start_program("run", "web1", "--", *PRINT_WORDS))
    assert (ended.status, ended.out) == (4, "")
    assert ended.err.startswith("error: web1 is in use by pid 1234\n")
    assert changes(manager) == []


@pytest.mark.parametrize("words", [["-tpmdev", "x"], ["-uuid", "11111111-2222-3333-4444-555555555555"]])
def test_nothing_is_started_when_the_command_is_refused(manager: CannedManager, words: list[str]) -> None:
    manager.vtpms["web1"] = STOPPED
    ended = finish(start_program("run", "web1", "--json", "--", *PRINT_WORDS, *words))
    assert (ended.status, ended.out, json.loads(ended.err)["code"]) == (2, "", "usage")
    assert changes(manager) == []


def test_the_vtpm_is_stopped_again_when_the_command_cannot_be_run(manager: CannedManager) -> None:
    manager.vtpms["web1"] = STOPPED
    ended = finish(start_program("run", "web1", "--", "no-such-program", "-daemonize"))
    assert ended.status == 2
    assert "error: no-such-program cannot be run: No such file or directory\n" in ended.err
    assert changes(manager) == [START, STOP]


def test_the_vtpm_is_stopped_again_when_the_manager_names_no_socket(manager: CannedManager) -> None:
    manager.vtpms["web1"] = STOPPED
    manager.control_socket = ""
    ended = finish(start_program("run", "web1", "--", *PRINT_WORDS))
    assert (ended.status, ended.out) == (10, "")
    assert changes(manager) == [START, STOP]


def test_the_vtpm_goes_on_when_the_command_has_detached(manager: CannedManager) -> None:
    manager.vtpms["web1"] = STOPPED
    ended = finish(start_program("run", "web1", "--", *PRINT_WORDS, "-daemonize"))
    assert ended.status == 0
    assert "web1 is in use and goes on; when done: vtpm stop web1\n" in ended.err
    assert changes(manager) == [START]


UP = [*PYTHON, "print('up', flush=True); input()"]
# What an instance in a PID namespace of its own knows of a client: that there is one, and its user.
OTHER = replace(RUNNING, client=Client("data", 0, 1000))


def _run_until_up() -> subprocess.Popen[str]:
    program = start_program("run", "web1", "--", *UP)
    assert program.stdout is not None
    assert program.stdout.readline() == "up\n"
    return program


def test_the_vtpm_goes_on_when_somebody_else_uses_it_by_then(manager: CannedManager) -> None:
    manager.vtpms["web1"] = STOPPED
    program = _run_until_up()
    manager.vtpms["web1"] = OTHER
    ended = finish(program, "\n")
    assert ended.status == 0
    assert "web1 is in use and goes on; when done: vtpm stop web1\n" in ended.err
    assert changes(manager) == [START]


def test_the_vtpm_is_stopped_when_the_hang_up_of_the_command_is_heard_a_little_later(manager: CannedManager) -> None:
    manager.vtpms["web1"] = STOPPED
    program = _run_until_up()
    manager.vtpms["web1"] = OTHER
    manager.after_looks["web1"] = (2, RUNNING)
    ended = finish(program, "\n")
    assert (ended.status, changes(manager)) == (0, [START, STOP])
    assert manager.asked[-1].body == {"force": False}


def test_the_vtpm_goes_on_when_a_virtual_machine_comes_between_the_last_look_and_the_stop(
    manager: CannedManager,
) -> None:
    manager.vtpms["web1"] = STOPPED
    program = _run_until_up()
    manager.used_at_stop["web1"] = IN_USE
    ended = finish(program, "\n")
    assert ended.status == 0
    assert "web1 is in use and goes on; when done: vtpm stop web1\n" in ended.err
    assert manager.vtpms["web1"] is IN_USE


def test_no_process_is_named_when_the_one_that_uses_it_is_not_known(manager: CannedManager) -> None:
    manager.vtpms["web1"] = OTHER
    ended = finish(start_program("run", "web1", "--", *PRINT_WORDS))
    assert ended.status == 4
    assert ended.err.startswith("error: web1 is in use by another client\n")


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
TELL_SIGNAL = """
import signal, sys
awaited = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
print('up', flush=True)
sys.exit(40 + signal.sigwait(awaited))
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_reaches_the_command_when_somebody_sends_it_to_us(manager: CannedManager, number: int) -> None:
    manager.vtpms["web1"] = STOPPED
    program = start_program("run", "web1", "--", *PYTHON, TELL_SIGNAL)
    assert program.stdout is not None
    assert program.stdout.readline() == "up\n"
    program.send_signal(number)
    ended = finish(program)
    assert ended.status == 40 + number
    assert changes(manager) == [START, STOP]


def test_the_status_is_128_and_the_signal_when_one_ends_the_command(manager: CannedManager) -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert finish(start_program("run", "web1", "--", *PYTHON, script)).status == 137


def test_no_signal_is_blocked_or_ignored_when_the_command_starts(manager: CannedManager) -> None:
    # A shell looks, for Python ignores some itself.
    ended = finish(start_program("run", "web1", "--", "sh", "-c", "cat /proc/self/status"))
    fields = dict(line.split(":\t", 1) for line in ended.out.splitlines() if ":\t" in line)
    # glibc keeps signals 32 and 33 for itself.
    standard = (1 << 31) - 1
    assert int(fields["SigBlk"], 16) & standard == 0
    assert int(fields["SigIgn"], 16) & standard == 0


COUNT_INTERRUPTS = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
print('ready to be [y/N]: interrupted', flush=True)
signal.sigwait([signal.SIGINT])
# Our parent takes its signals lowest number first: when this one comes back, it has dealt with the interrupt.
os.kill(os.getppid(), signal.SIGTERM)
signal.sigwait([signal.SIGTERM])
print('again' if signal.SIGINT in signal.sigpending() else 'once', flush=True)
"""


def test_an_interrupt_comes_once_when_the_terminal_sends_it(manager: CannedManager) -> None:
    ended = on_terminal("run", "web1", "--", *PYTHON, COUNT_INTERRUPTS, typed="\x03")
    assert ended.status == 0
    assert "once" in ended.out


@contextmanager
def _swtpm(directory: Path) -> Iterator[str]:
    """Debian's swtpm, its control channel listening in a folder whose name has commas."""
    folder = directory / "a,,b,c"
    folder.mkdir()
    (directory / "state").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "ctrl"))
        listener.listen(1)
        swtpm = subprocess.Popen(
            [
                *("swtpm", "socket", "--tpm2", "--ctrl", f"type=unixio,fd={listener.fileno()}"),
                *("--tpmstate", f"dir={directory / 'state'}", "--terminate"),
            ],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    with swtpm:
        try:
            yield str(folder / "ctrl")
            assert swtpm.wait(TIMEOUT_S) == 0
        finally:
            swtpm.kill()


@pytest.mark.parametrize("device", [[], ["-device", "tpm-tis,tpmdev=vtpm0"]], ids=["tpm-crb", "tpm-tis"])
def test_a_real_qemu_has_the_tpm_and_the_uuid_when_it_is_run(
    manager: CannedManager, tmp_path: Path, device: list[str]
) -> None:
    manager.vtpms["web1"] = STOPPED
    qemu = ["qemu-system-x86_64", "-M", "q35,accel=tcg", "-m", "64", "-nodefaults", "-S", "-display", "none"]
    with _swtpm(tmp_path) as manager.control_socket:
        program = start_program("run", "web1", "--", *qemu, "-monitor", "stdio", *device)
        ended = finish(program, "info tpm\ninfo uuid\nquit\n")
    assert ended.status == 0
    assert f"tpm0: model={'tpm-tis' if device else 'tpm-crb'}\n" in ended.out
    assert "vtpm0: type=emulator,chardev=vtpm-chr0\n" in ended.out
    assert f"\n{VM_UUID}\n" in ended.out
    assert changes(manager) == [START, STOP]
