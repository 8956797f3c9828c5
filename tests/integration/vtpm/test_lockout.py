"""Dictionary-attack lockout on real vTPMs: what counts, what does not, and what `vtpm show` says of it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import struct
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.fault.test_failed_successor import Emulator
from tests.fault.writer import TpmConnection, data_socket
from tests.support.host import Host, kill_process
from tests.unit.engine import commands as c
from vtpm.client.manager_client import ManagerClient
from vtpm.tpm.lockout import GET_LOCKOUT, Lockout, parse_lockout
from vtpm.tpm.return_codes import Rc20, is_auth_fail_20
from vtpm.tpm.types import Startup, TpmVersion
from vtpm.wire.api import AuditEvent
from vtpm.wire.emulator import Command, Plain

TIMEOUT_S = 20.0
INDEX = 0x0180_0100
PASSWORD = b"right"
SHUTDOWN = bytes.fromhex("8001 0000000c 00000145 0000")
MAX_TRIES = 3
"""Of a TPM that libtpms manufactured."""


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture
def client(host: Host) -> Iterator[ManagerClient]:
    with host.client() as client:
        yield client


class Tpm:
    """One running vTPM with an NV index under dictionary-attack protection."""

    def __init__(self, client: ManagerClient, name: str) -> None:
        self._client = client
        self.name = name
        self.first_event = max((event.id for event in client.all_events()), default=0)
        client.create(name)
        self.start()
        with self.connect() as tpm:
            assert c.code_of(tpm.transact(c.da_define(INDEX, PASSWORD))) == 0
            _use(tpm)

    def start(self) -> None:
        self._client.start(self.name, Startup.CLEAR)

    def connect(self) -> TpmConnection:
        return TpmConnection(data_socket(self._client.show(self.name).tcti))

    def use(self) -> Lockout:
        """Authorise its index with the right password; return what the TPM says of lockout then."""
        with self.connect() as tpm:
            _use(tpm)
            return parse_lockout(tpm.transact(GET_LOCKOUT))

    def look(self) -> Lockout:
        with self.connect() as tpm:
            return parse_lockout(tpm.transact(GET_LOCKOUT))

    def lock(self) -> int:
        """Give wrong passwords until the TPM is locked; how many failed."""
        with self.connect() as tpm:
            for tries in itertools.count():
                code = _again(tpm.transact, c.da_read(INDEX, b"wrong"))
                if code == Rc20.TPM_RC_LOCKOUT:
                    return tries
                assert is_auth_fail_20(code)
        raise AssertionError("unreachable")

    def kill(self) -> None:
        """Kill its instance and wait until the manager knows."""
        last = max(event.id for event in self._client.all_events())
        pid = self._client.show(self.name).pid
        assert pid is not None
        kill_process(pid)
        self.await_event("instance_died", last)

    def await_event(self, kind: str, after: int) -> AuditEvent:
        deadline_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_s:
            for event in self._client.events(after, wait_s=2):
                after = event.id
                if (event.kind, event.vtpm) == (kind, self.name):
                    return event
        raise AssertionError(f"no event {kind}")

    def lockouts(self) -> list[AuditEvent]:
        """All events about its lockout."""
        events = self._client.all_events(self.first_event)
        return [event for event in events if (event.kind, event.vtpm) == ("locked_out", self.name)]


def _again(transact: object, command: bytes) -> int:
    """The code of the answer; the first use in a boot is noted in NV, and the command to be sent again."""
    assert callable(transact)
    code = c.code_of(transact(command))
    return c.code_of(transact(command)) if code == Rc20.TPM_RC_RETRY else code


def _use(tpm: TpmConnection) -> None:
    assert _again(tpm.transact, c.da_write(INDEX, PASSWORD, bytes(8))) == 0


@pytest.mark.timeout(180)
def test_nothing_counts_when_a_vtpm_is_stopped_in_order_twenty_times(client: ManagerClient) -> None:
    tpm = Tpm(client, "orderly")
    for _ in range(20):
        client.stop(tpm.name)
        tpm.start()
        assert tpm.use() == Lockout(False, 0, MAX_TRIES, 1000)
    assert tpm.lockouts() == []


def test_nothing_counts_when_an_emulator_goes_or_says_shutdown_or_all_is_shut_down() -> None:
    with Host() as host:
        with host.client() as client:
            tpm = Tpm(client, "web1")
            for ending in ("goes", "shutdown"):
                with Emulator(Path(client.show(tpm.name).control_socket)) as emulator:
                    emulator.power_on()
                    assert _again(emulator.tpm, c.da_read(INDEX, PASSWORD)) == 0
                    if ending == "shutdown":
                        assert emulator.control(Plain(Command.SHUTDOWN)).result == 0
                with Emulator(_free(client, tpm.name)) as emulator:
                    emulator.power_on()
                    assert parse_lockout(emulator.tpm(GET_LOCKOUT)).failed_tries == 0
            client.stop(tpm.name, force=True)
            tpm.start()
            tpm.use()
            client.shutdown()
        host.stop_manager()
        host.start()
        with host.client() as client:
            shown = client.start("web1", Startup.CLEAR)
            assert shown.lockout is None
            with TpmConnection(data_socket(shown.tcti)) as connection:
                assert parse_lockout(connection.transact(GET_LOCKOUT)).failed_tries == 0


def _free(client: ManagerClient, name: str) -> Path:
    """The control socket, once the emulator before is let go."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while (shown := client.show(name)).client is not None:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return Path(shown.control_socket)


def test_reset_counts_when_the_guest_did_not_shut_its_tpm_down_alone(client: ManagerClient) -> None:
    tpm = Tpm(client, "reset")
    with Emulator(Path(client.show(tpm.name).control_socket)) as emulator:
        counted = []
        emulator.power_on()
        for last_words in (SHUTDOWN, GET_LOCKOUT, SHUTDOWN):
            assert _again(emulator.tpm, c.da_read(INDEX, PASSWORD)) == 0
            assert c.code_of(emulator.tpm(last_words)) == 0
            emulator.power_on()
            counted.append(parse_lockout(emulator.tpm(GET_LOCKOUT)).failed_tries)
    # Nor did it count that the emulator ended what a client before it had used.
    assert counted == [0, 1, 1]


def test_kills_count_when_the_protected_index_was_used_and_lock_at_the_third(client: ManagerClient) -> None:
    tpm = Tpm(client, "killed")
    for number in range(1, MAX_TRIES):
        tpm.kill()
        tpm.start()
        assert tpm.look() == Lockout(False, number, MAX_TRIES, 1000)
        assert client.show(tpm.name).lockout is None
        # Killed without having used it: not counted.
        if number == 1:
            tpm.kill()
            tpm.start()
            assert tpm.look().failed_tries == number
        tpm.use()
    tpm.kill()
    # No password was wrong, and nobody was told TPM_RC_LOCKOUT yet.
    shown = client.start(tpm.name, Startup.CLEAR)
    assert shown.lockout is not None
    assert (shown.lockout.failed_tries, shown.lockout.max_tries) == (MAX_TRIES, MAX_TRIES)
    assert tpm.await_event("locked_out", tpm.first_event).detail["since"] == shown.lockout.since


def test_lock_is_shown_with_its_time_and_noted_once_when_passwords_were_wrong(
    host: Host, client: ManagerClient
) -> None:
    tpm = Tpm(client, "guessed")
    begin_s = int(time.time())
    assert tpm.lock() == MAX_TRIES
    event = tpm.await_event("locked_out", tpm.first_event)
    lockout = client.show(tpm.name).lockout
    assert lockout is not None
    assert begin_s <= datetime.fromisoformat(lockout.since).timestamp() <= time.time()
    assert (lockout.failed_tries, lockout.max_tries, lockout.interval_s) == (MAX_TRIES, MAX_TRIES, 1000)
    assert event.detail == {
        "since": lockout.since,
        "failed_tries": str(MAX_TRIES),
        "max_tries": str(MAX_TRIES),
        "interval_s": "1000",
    }
    said = host.cli("show", tpm.name).stdout
    assert f"since {lockout.since}: 3 of 3 failed" in said
    assert "tpm2_dictionarylockout -c -T" in said

    # The right password too is refused now, and a manager that comes new knows all.
    with tpm.connect() as connection:
        assert c.code_of(connection.transact(c.da_read(INDEX, PASSWORD))) == Rc20.TPM_RC_LOCKOUT
    host.stop_manager()
    host.start()
    with host.client() as again:
        assert again.show(tpm.name).lockout == lockout
        assert [one.detail["since"] for one in tpm.lockouts()] == [lockout.since]

        # Stopped it is not looked at; started again it is as locked as before.
        again.stop(tpm.name)
        assert again.show(tpm.name).lockout is None
        assert again.start(tpm.name, Startup.CLEAR).lockout is not None

        with tpm.connect() as connection:
            assert c.code_of(connection.transact(c.da_lock_reset())) == 0
        assert json.loads(host.cli("show", tpm.name, "--json").stdout)["lockout"] is None
        assert "LOCKED" not in host.cli("show", tpm.name).stdout
        tpm.use()


def test_lock_is_no_longer_shown_when_its_time_is_over_though_nobody_asked_the_tpm(client: ManagerClient) -> None:
    tpm = Tpm(client, "forgiven")
    with tpm.connect() as connection:
        assert c.code_of(connection.transact(c.da_parameters(1, 1, 1))) == 0
        assert is_auth_fail_20(_again(connection.transact, c.da_read(INDEX, b"wrong")))
    tpm.await_event("locked_out", tpm.first_event)
    deadline_s = time.monotonic() + TIMEOUT_S
    while client.show(tpm.name).lockout is not None:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert tpm.look().failed_tries == 0


def test_show_says_what_was_known_when_the_tpm_does_not_answer_in_time(client: ManagerClient) -> None:
    tpm = Tpm(client, "busy")
    tpm.lock()
    tpm.await_event("locked_out", tpm.first_event)
    shown = client.show(tpm.name)
    assert shown.lockout is not None and shown.pid is not None
    os.kill(shown.pid, signal.SIGSTOP)
    try:
        begin_s = time.monotonic()
        assert client.show(tpm.name).lockout == shown.lockout
        assert client.show(tpm.name).lockout == shown.lockout
        assert time.monotonic() - begin_s < 5
    finally:
        os.kill(shown.pid, signal.SIGCONT)
    assert client.show(tpm.name).lockout == shown.lockout


def test_no_lockout_is_shown_when_the_tpm_is_a_1_2(client: ManagerClient) -> None:
    client.create("old", tpm_version=TpmVersion.V1_2)
    shown = client.start("old", Startup.CLEAR)
    # TPM_GetRandom with a TPM 2.0's tag and code is refused, and is no sign of anything.
    with TpmConnection(data_socket(shown.tcti)) as tpm:
        assert struct.unpack_from(">I", tpm.transact(GET_LOCKOUT), 6)[0] != 0
    assert client.show("old").lockout is None
