"""kill -9 of the manager at every step of an import: the vTPM is there whole, or nothing of it is."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.integration.vtpm.test_backups import VALUE, looked_at, manufactured
from tests.support.host import Host
from vtpm.errors import UnavailableError
from vtpm.recovery_key import RecoveryKey
from vtpm.wire.api import ExportVtpm, ImportBackup

WAIT_S = 20.0


@contextmanager
def killed_at(host: Host, call: str, number: int, *more: str) -> Iterator[None]:
    """Have the kernel kill the manager as it enters the n-th of these system calls, which is not done any more."""
    inject = f"inject={call}:signal=SIGKILL:when={number}"
    strace = subprocess.Popen(
        ["strace", *more, "-p", str(host.pid("manager")), "-o", "/dev/null", "-e", f"trace={call}", "-e", inject],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert strace.stderr is not None
        assert "attached" in strace.stderr.readline()
        yield
    finally:
        # The kernel lets a manager that lives on go; one that was killed dies only now, or strace would wait for ever.
        strace.kill()
        strace.communicate(timeout=WAIT_S)


class Attempts:
    """Imports of one backup, over and over, each killed at another step."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.whole = 0
        self.none = 0
        key = RecoveryKey.generate()
        with host.client() as client:
            self._before, self._ek = manufactured(client, "web1")
            exported = client.export("web1", ExportVtpm(key.public.to_text()))
            client.delete("web1")
        self._wanted = ImportBackup(exported.backup, original_is_dead=True, recovery_key=key.to_text())

    def until_not_killed(self, call: str, *more: str) -> int:
        """Kill at the first call, then at the second, and so on; returns how many there are in one import."""
        for number in itertools.count(1):
            killed = False
            with killed_at(self._host, call, number, *more), self._host.client() as client:
                try:
                    client.import_backup(self._wanted)
                except UnavailableError:
                    killed = True
            if killed:
                # Reaps it.
                self._host.kill("manager")
                self._host.start()
            self._check(killed)
            if not killed:
                return number - 1
        raise AssertionError("not reached")

    def _check(self, killed: bool) -> None:
        with self._host.client() as client:
            found = client.list()
            self.whole += bool(found)
            self.none += not found
            assert killed or found
            for vtpm in found:
                # Each import that came to pass took an epoch, deleted since or not; the others took none.
                assert (vtpm.name, vtpm.uuid, vtpm.epoch) == ("web1", self._before.uuid, 1 + self.whole)
                assert looked_at(client, "web1") == (VALUE, self._ek)
                client.delete("web1")
            assert sum(event.kind == "imported" for event in client.all_events()) == self.whole


@pytest.mark.timeout(240)
def test_vtpm_is_whole_or_not_there_when_the_manager_is_killed_while_it_imports() -> None:
    with Host() as host:
        attempts = Attempts(host)
        writes = attempts.until_not_killed("pwrite64", "-f")
        # Killed while it writes: nothing is there. The run that was not killed is whole.
        assert writes >= 4
        assert (attempts.none, attempts.whole) == (writes, 1)
        # At the last flush all is written, so that a new manager finds the vTPM and anchors it.
        flushes = attempts.until_not_killed("fdatasync", "-f")
        assert flushes >= 1
        assert attempts.whole >= 3
        # Anchored, and not answered yet: the main thread, which alone is looked at, sends the reply.
        before = attempts.none
        assert attempts.until_not_killed("sendto") >= 1
        assert attempts.none == before
        print(f"killed at {writes} writes, {flushes} flushes: {attempts.none} left nothing, {attempts.whole} all")
