"""An operator who does all that changes a host's state, knows what was answered, and holds the host against that."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric import ec

from tests.fault.writer import TpmGone, Writer, data_socket
from tests.support.host import Host
from tests.support.tls import certificate_of
from vtpm.client.manager_client import ManagerClient
from vtpm.errors import VtpmError
from vtpm.migration.certificates import PlatformKind, new_authority
from vtpm.migration.enrolment import certify_request, decode_request, encode_file
from vtpm.wire.api import LifeState

VTPM = "web"
PEER = "other-host"
WRITES = 3
SETTLE_TIMEOUT_S = 20.0
_LABEL = "next-"
_MOST_LEFT = 3


class Operations:
    """See the module.

    Args:
        host: new; its vTPM is made by the first `do`.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._certificate = certificate_of(PEER)
        self._writer: Writer | None = None
        self._number = 0
        # Names and labels that were answered, and whether they must be there. What was under way is not in them.
        self._vtpms: dict[str, bool] = {}
        self._labels: dict[str, bool] = {}
        self._peers: dict[str, bool] = {}
        # Fingerprint of the recovery key; None while it may be one that was made and never shown.
        self._recovery: str | None = ""
        # Name under which the platform is enrolled; None while it may be another.
        self._enrolled: str | None = None
        self._authority = ec.generate_private_key(ec.SECP256R1())

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def do(self, killed: Callable[[], bool]) -> None:
        """Do everything once; it may fail when a program was killed meanwhile, and then the rest is not tried."""
        self._number += 1
        try:
            with self._host.client() as client:
                self._allow_and_drop(client, f"{_LABEL}{self._number}")
                self._make_recovery_key(client)
                self._add_and_remove_peer(client)
                self._enrol(client, f"host-{self._number}")
                self._make_and_delete(client, f"other-{self._number}")
                self._write(client)
                client.stop(VTPM)
        except (VtpmError, TpmGone):
            if not killed():
                raise

    def check(self) -> None:
        """Everything that was answered is there, and nothing is refused. The host was started again."""
        with self._host.client() as client:
            status = client.status()
            assert status.platform is not None
            assert status.platform.locked == ""
            assert status.anchor is not None, status.warnings
            assert self._recovery in (None, status.platform.recovery), "another recovery key than the last one"
            self._recovery = status.platform.recovery
            _check_names(self._vtpms, {vtpm.name for vtpm in client.list()})
            _check_names(self._labels, {found.label for found in client.policy().sets})
            _check_names(self._peers, {peer.name for peer in client.peers()})
            if self._enrolled is not None:
                assert client.enrolled().name == self._enrolled
            ids = [event.id for event in client.all_events()]
            assert ids == list(range(1, len(ids) + 1))
            if self._writer is not None:
                self._open(client, self._writer)
                self._writer.check()

    def _write(self, client: ManagerClient) -> None:
        if self._writer is None:
            if VTPM in {vtpm.name for vtpm in client.list()}:
                # The one before did not come to the end of its beginning.
                if client.show(VTPM).state is not LifeState.STOPPED:
                    client.stop(VTPM)
                self._vtpms.pop(VTPM, None)
                client.delete(VTPM)
            client.create(VTPM)
            self._vtpms[VTPM] = True
            self._writer = Writer(data_socket(client.start(VTPM).tcti))
        else:
            self._open(client, self._writer)
        self._writer.start()
        self._writer.await_writes(WRITES)
        if not self._writer.stop():
            raise TpmGone(str(self._writer.error))

    def _open(self, client: ManagerClient, writer: Writer) -> None:
        """Have the vTPM run, and be connected to it; it may have failed meanwhile."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while True:
            state = client.show(VTPM).state
            if state in (LifeState.STOPPED, LifeState.FAILED):
                client.start(VTPM)
            try:
                writer.reconnect()
                return
            except TpmGone:
                assert time.monotonic() < deadline, f"{VTPM} is {state} and does not answer"
                time.sleep(0.02)

    def _make_and_delete(self, client: ManagerClient, name: str) -> None:
        client.create(name)
        self._vtpms[name] = True
        del self._vtpms[name]
        client.delete(name)
        self._vtpms[name] = False

    def _allow_and_drop(self, client: ManagerClient, label: str) -> None:
        size = len(client.policy().current)
        # Kills that come again and again before the end leave a set each, and there is room for a few alone.
        self._drop(client, sorted(self._sets(client))[:-_MOST_LEFT])
        client.policy_allow(label, [f"{self._number:064x}"] * size)
        self._labels[label] = True
        self._drop(client, sorted(self._sets(client) - {label}))

    def _sets(self, client: ManagerClient) -> set[str]:
        return {found.label for found in client.policy().sets if found.label.startswith(_LABEL)}

    def _drop(self, client: ManagerClient, labels: Iterable[str]) -> None:
        for label in labels:
            self._labels.pop(label, None)
            client.policy_drop(label)
            self._labels[label] = False

    def _add_and_remove_peer(self, client: ManagerClient) -> None:
        self._peers.pop(PEER, None)
        client.add_peer(PEER, "https://192.0.2.1:8000", self._certificate)
        self._peers[PEER] = True
        del self._peers[PEER]
        client.remove_peer(PEER)
        self._peers[PEER] = False

    def _enrol(self, client: ManagerClient, name: str) -> None:
        asked = decode_request(client.request_enrolment(name).request.encode())
        now = datetime.now(UTC)
        authority = new_authority("test", self._authority, now)
        sealed = certify_request(authority, self._authority, asked, PlatformKind.EMBEDDED, now)
        self._enrolled = None
        client.keep_certificate(encode_file(sealed).decode())
        self._enrolled = name

    def _make_recovery_key(self, client: ManagerClient) -> None:
        self._recovery = None
        made = client.new_recovery_key()
        client.confirm_recovery_key(made.public_key)
        self._recovery = made.fingerprint


def _check_names(wanted: Mapping[str, bool], found: set[str]) -> None:
    lost = {name for name, there in wanted.items() if there} - found
    assert not lost, f"lost: {lost}"
    back = {name for name, there in wanted.items() if not there} & found
    assert not back, f"came back: {back}"
