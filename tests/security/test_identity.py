"""A vTPM that was taken over asks for another's state, says that it is another, or is started a second time.

Who an instance is follows from its end of a manager link and from nothing that it can send.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import typing
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from tests.fault.writer import Writer, closing, data_socket
from tests.security.stored_host import LIMIT_S, PERMANENT
from tests.security.stored_host import Host as Store
from tests.support.host import Host
from tests.unit.vault.world import ENGINE, KEY
from vtpm.errors import ConflictError, StateError, VtpmError
from vtpm.manager.instance_link import InstanceLink
from vtpm.tpm.types import InstanceId, TpmVersion, VtpmId
from vtpm.wire.framing import Deframer, encode_frame
from vtpm.wire.launcher import LAUNCHER, LAUNCHER_SOCKET, StartArgs, VtpmArgs
from vtpm.wire.manager_link import (
    MAX_BODY_BYTES,
    ClientKind,
    Direction,
    Hello,
    LinkPower,
    Load,
    LoadError,
    Ready,
    Saved,
    SaveError,
    StateChunk,
    ToManager,
    decode_message,
    encode_message,
)
from vtpm.wire.manager_link_peers import save_messages
from vtpm.wire.packet_socket import PacketClient

pytestmark = pytest.mark.timeout(60)


# On a link


class TakenOver:
    """A vtpmd in an attacker's hands: its end of its manager link, and the manager's end of it."""

    def __init__(self, store: Store, name: str, vtpm: tuple[VtpmId, InstanceId]) -> None:
        mine, managers = socket.socketpair()
        mine.setblocking(False)
        self._sock = mine
        self._deframer = Deframer(MAX_BODY_BYTES)
        self._came: list[object] = []
        self.link = InstanceLink(
            managers, name, *vtpm, TpmVersion.V2_0, store.vault, lambda *_: None, lambda _: pytest.fail("condemned")
        )

    async def receive(self) -> object:
        """Return the next message of the manager's."""
        while not self._came:
            data = await asyncio.get_running_loop().sock_recv(self._sock, 65536)
            assert data, "the manager closed the link"
            for body in self._deframer.feed(data):
                assert isinstance(body, bytes)
                self._came.append(decode_message(body, Direction.TO_INSTANCE))
        return self._came.pop(0)

    async def hello(self) -> bytes:
        """Return the session of the manager's hello."""
        hello = await self.receive()
        assert isinstance(hello, Hello)
        return hello.session

    async def send(self, *messages: ToManager) -> None:
        for message in messages:
            await self.send_body(encode_message(message))

    async def send_body(self, body: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, encode_frame(body))

    def close(self) -> None:
        self.link.close()
        self._sock.close()


def ready(session: bytes, version: TpmVersion = TpmVersion.V2_0) -> Ready:
    return Ready(session, version, LinkPower.OFF, ClientKind.NONE, ENGINE, 0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A vault with its committer; nothing of it is in memory only."""
    store = Store(tmp_path)
    store.start()
    yield store
    store.stop()


def on_links(store: Store, attack: Callable[[TakenOver, TakenOver], Awaitable[None]]) -> None:
    """Run an attack of web1's instance, beside web2's."""

    async def run() -> None:
        async with asyncio.timeout(LIMIT_S):
            both = [TakenOver(store, name, store.make(name)) for name in ("web1", "web2")]
            try:
                await attack(*both)
            finally:
                for one in both:
                    one.close()

    asyncio.run(run())


def stored(store: Store, vtpm_id: VtpmId) -> object:
    return store.run(lambda opened: (opened.get_vtpm(vtpm_id), opened.read_state(vtpm_id)))


def test_nothing_that_an_instance_can_send_names_a_vtpm_when_its_messages_are_listed() -> None:
    for message in typing.get_args(ToManager):
        for name, kind in typing.get_type_hints(message).items():
            assert kind is not UUID and getattr(kind, "__supertype__", None) is not UUID, (message, name)
            assert not re.search(r"vtpm|uuid|instance|name", name), (message, name)
            # Bytes stand for a hello's session, a permit, a digest, or the TPM's own state.
            assert kind is not bytes or name in {"session", "permit_id", "digest", "data"}, (message, name)


def test_own_state_is_given_and_a_siblings_uuid_is_refused_when_a_load_carries_one(store: Store) -> None:
    async def attack(taken: TakenOver, sibling: TakenOver) -> None:
        await taken.send(ready(await taken.hello()))
        # There is no field for it: a longer message is no message.
        await taken.send_body(encode_message(Load(1)) + sibling.link.vtpm_id.bytes)
        await taken.send(Load(2))
        answer = await taken.receive()
        assert isinstance(answer, StateChunk)
        assert (answer.seq, answer.data) == (2, b"first of web1")
        assert (taken.link.complaints, sibling.link.complaints) == (1, 0)

    on_links(store, attack)


def test_siblings_state_stays_when_an_instance_saves_with_all_that_it_could_know_of_it(store: Store) -> None:
    async def attack(taken: TakenOver, sibling: TakenOver) -> None:
        await taken.send(ready(await taken.hello()))
        before = stored(store, sibling.link.vtpm_id)
        record = store.run(lambda opened: opened.get_vtpm(sibling.link.vtpm_id))
        (saved,) = store.run(lambda opened: opened.read_state(sibling.link.vtpm_id))
        # The sibling's permit does not make this one blank again.
        await taken.send(*save_messages(50, PERMANENT, b"blank", record.permit.permit_id))
        refusal = await taken.receive()
        assert isinstance(refusal, SaveError) and "its permit is used up" in refusal.message
        # The sibling's sealed state is to this vTPM so many bytes of its own.
        await taken.send(*save_messages(51, PERMANENT, saved.envelope, None))
        assert await taken.receive() == Saved(51)
        assert stored(store, sibling.link.vtpm_id) == before
        assert store.content((taken.link.vtpm_id, taken.link.instance_id)) == saved.envelope

    on_links(store, attack)


@pytest.mark.parametrize("forged", ["another link's session", "another TPM version"])
def test_instance_is_not_taken_for_ready_when_it_answers_as_another(store: Store, forged: str) -> None:
    async def attack(taken: TakenOver, sibling: TakenOver) -> None:
        session, other = await taken.hello(), await sibling.hello()
        await taken.send(ready(other) if "session" in forged else ready(session, TpmVersion.V1_2))
        # What comes before a right answer is not followed either.
        await taken.send(Load(1), ready(session), Load(2))
        await taken.link.ready(10.0)
        assert taken.link.complaints == 1
        answer = await taken.receive()
        assert isinstance(answer, StateChunk) and answer.seq == 2

    on_links(store, attack)


def test_nothing_is_loaded_or_saved_on_a_link_when_its_instance_is_not_the_bound_one(store: Store) -> None:
    async def attack(taken: TakenOver, sibling: TakenOver) -> None:
        # A descriptor that was made for one instance and came to be used for another vTPM, or by a successor's dead.
        for vtpm_id in (taken.link.vtpm_id, sibling.link.vtpm_id):
            stranger = TakenOver(store, "web1", (vtpm_id, InstanceId(uuid4())))
            try:
                await stranger.send(ready(await stranger.hello()), Load(1))
                refusal = await stranger.receive()
                assert isinstance(refusal, LoadError) and "is not bound" in refusal.message
                before = stored(store, vtpm_id)
                await stranger.send(*save_messages(2, PERMANENT, b"usurped", None))
                refusal = await stranger.receive()
                assert isinstance(refusal, SaveError) and "is not bound" in refusal.message
                assert stored(store, vtpm_id) == before
            finally:
                stranger.close()

    on_links(store, attack)


# A second instance


def test_second_instance_is_refused_and_the_first_goes_on_when_a_vtpm_is_open(store: Store) -> None:
    vtpm_id, first = store.make()
    second = InstanceId(uuid4())
    with pytest.raises(ConflictError, match="already has an instance"):
        store.run(lambda opened: opened.bind_instance(vtpm_id, second))
    with pytest.raises(ConflictError, match="is open in the vault already"):
        store.vault.open_vtpm(vtpm_id, KEY)
    with pytest.raises(ConflictError, match="is not bound"):
        store.vault.load(vtpm_id, second, ENGINE)
    with pytest.raises(ConflictError, match="is not bound"):
        store.vault.save(vtpm_id, second, 1, PERMANENT, b"of a second").result(LIMIT_S)
    store.save((vtpm_id, first), b"of the first").result(LIMIT_S)
    assert store.content((vtpm_id, first)) == b"of the first"


def test_instance_of_one_vtpm_is_refused_when_it_is_to_be_anothers_too(store: Store) -> None:
    _, first = store.make("web1")
    second_id, second = store.make("web2")
    store.run(lambda opened: opened.unbind_instance(second_id, second))
    with pytest.raises(ConflictError, match="is another vTPM's"):
        store.run(lambda opened: opened.bind_instance(second_id, first))


def test_no_permit_is_given_when_the_state_of_a_vtpm_is_gone(store: Store) -> None:
    """A second manufacture would be a second TPM of the same name."""
    vtpm_id, instance = store.make()
    with pytest.raises(StateError, match="manufactured before"):
        store.run(lambda opened: opened.issue_permit(vtpm_id, instance, ENGINE))


# On a host


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host, host.client() as client:
        for name in ("web1", "web2"):
            client.create(name)
            client.start(name)
        yield host


def test_launcher_refuses_a_second_instance_and_the_first_goes_on_when_one_runs(host: Host) -> None:
    with host.client() as client, closing([writer := Writer(data_socket(client.show("web1").tcti))]):
        shown = client.show("web1")
        writer.start()
        writer.await_writes(3)
        launcher = PacketClient(LAUNCHER, host.run_dir / LAUNCHER_SOCKET)
        try:
            for vtpm_id, name in ((shown.uuid, "web3"), (uuid4(), "web1")):
                args = StartArgs(VtpmId(vtpm_id), name, TpmVersion.V2_0, "process", 0, 0, shown.measurement)
                with pytest.raises(ConflictError, match="running"):
                    launcher.call("start", args, timeout_s=LIMIT_S)
            running, _ = launcher.call("attach", VtpmArgs(VtpmId(shown.uuid)), timeout_s=LIMIT_S)
        finally:
            launcher.close()
        assert running.pid == shown.pid
        with pytest.raises(VtpmError):
            client.start("web1")
        writer.await_writes(6)
        assert writer.stop(), writer.error
        writer.check()
        assert client.show("web1").pid == shown.pid


def test_instance_has_no_siblings_link_when_its_descriptors_are_looked_at(host: Host) -> None:
    with host.client() as client:
        pids = [vtpm.pid for vtpm in client.list()]
    inodes = [_inodes(pid) for pid in pids if pid is not None]
    assert len(inodes) == 2 and all(inodes)
    assert inodes[0].isdisjoint(inodes[1])


def _inodes(pid: int) -> set[str]:
    """What a process has open that it could share: sockets and memory of its own."""
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return {link for link in links if link.startswith(("socket:", "pipe:"))}
