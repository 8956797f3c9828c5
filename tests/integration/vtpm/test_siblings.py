"""One instance, or one user, that misbehaves: its siblings go on, and the manager answers."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from tests.fault.writer import Writer, closing, data_socket
from tests.support.host import BIN, Host
from vtpm.client.manager_client import ManagerClient
from vtpm.manager.http_server import MAX_CONNECTIONS_PER_UID, REQUEST_S
from vtpm.wire.api import LifeState
from vtpm.wire.instance_spec import InstanceFd

pytestmark = pytest.mark.timeout(120)
PATIENCE_S = 1.5
_PIDFD_GETFD = 438


@contextmanager
def _stopped(pid: int) -> Iterator[int]:
    """Hold a process with SIGSTOP; yields its pidfd."""
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
    try:
        yield pidfd
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        os.close(pidfd)


def _started(client: ManagerClient, name: str) -> int:
    client.create(name)
    pid = client.start(name).pid
    assert pid is not None
    return pid


def test_siblings_write_on_when_the_manager_restarts_and_one_instance_does_not_answer() -> None:
    with Host() as host, host.client() as client, ExitStack() as stack:
        silent = _started(client, "a-silent")
        _started(client, "busy")
        writer = Writer(data_socket(client.show("busy").tcti))
        stack.enter_context(closing([writer]))
        stack.enter_context(_stopped(silent))
        writer.start()
        writer.await_writes(5)
        host.kill("manager")
        host.start()
        writer.await_writes(20)
        assert writer.stop(), writer.error
        assert writer.longest_s < PATIENCE_S
        writer.check()
        assert client.show("busy").state is LifeState.RUNNING


def test_siblings_write_on_and_it_is_ended_when_instances_send_garbage() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with Host() as host, host.client() as client, ExitStack() as stack:
        pids = [_started(client, f"hostile{number}") for number in range(4)]
        _started(client, "busy")
        writer = Writer(data_socket(client.show("busy").tcti))
        stack.enter_context(closing([writer]))
        links = []
        for pid in pids:
            # As a vtpmd that was taken over: its end of the manager link, used by somebody else.
            pidfd = stack.enter_context(_stopped(pid))
            fd = libc.syscall(_PIDFD_GETFD, pidfd, int(InstanceFd.MANAGER_LINK), 0)
            assert fd >= 0, os.strerror(ctypes.get_errno())
            link = socket.socket(fileno=fd)
            stack.enter_context(link)
            link.setblocking(False)
            links.append(link)
        writer.start()
        writer.await_writes(5)
        deadline = time.monotonic() + 60
        open_links = {link.fileno(): link for link in links}
        while open_links:
            assert time.monotonic() < deadline, "an instance that sends garbage is not ended"
            _, writable, _ = select.select([], list(open_links), [], 1)
            for fd in writable:
                try:
                    open_links[fd].send(b"\xc0x" * 32768)
                except BlockingIOError:
                    continue
                except OSError:
                    del open_links[fd]
        writer.await_writes(20)
        assert writer.stop(), writer.error
        assert writer.longest_s < PATIENCE_S
        writer.check()
        events = [(event.kind, event.vtpm) for event in client.all_events()]
        for number in range(4):
            assert client.show(f"hostile{number}").state is LifeState.STOPPED
            assert events.count(("misbehaved", f"hostile{number}")) == 1


_HALF_REQUESTS = """
import os, socket, sys
os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
held = []
for _ in range(int(sys.argv[3])):
    sock = socket.socket(socket.AF_UNIX)
    held.append(sock)
    try:
        sock.connect(sys.argv[1])
        sock.sendall(b"GET /v1/status HTTP/1.1\\r\\n")
    except OSError:
        pass  # one too many
print("held", flush=True)
held[0].settimeout(float(sys.argv[4]))
print("ended" if not held[0].recv(1) else "answered", flush=True)
"""


def test_root_is_answered_when_other_users_hold_all_connections_that_they_can() -> None:
    with Host() as host, ExitStack() as stack:
        holders = []
        for number in range(9):
            words = [host.socket, str(60000 + number), str(MAX_CONNECTIONS_PER_UID), str(4 * REQUEST_S)]
            holder = subprocess.Popen(
                [sys.executable, "-I", "-c", _HALF_REQUESTS, *words], stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(holder)
            stack.callback(holder.kill)
            holders.append(holder)
        for holder in holders:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
        began = time.monotonic()
        with host.client() as client:
            assert client.status().services
        assert time.monotonic() - began < REQUEST_S / 2
        # And what they hold is not theirs for long.
        assert holders[0].stdout is not None
        assert holders[0].stdout.readline() == "ended\n"


def test_manager_is_refused_when_the_keeper_runs_with_another_platform_tpm() -> None:
    with Host() as host:
        host.stop_manager()
        other = ["--config", host.config, "--platform-tpm", "device:/dev/absent"]
        other += ["--state-dir", host.state_dir, "--run-dir", host.run_dir]
        done = subprocess.run([BIN / "vtpm-managerd", *other], capture_output=True, text=True, timeout=60)
        assert done.returncode == 4
        assert "'embedded'" in done.stderr
        assert "device:/dev/absent" in done.stderr
        host.start()
        assert json.loads(host.cli("status", "--json").stdout)["platform"]["kind"] == "embedded"
