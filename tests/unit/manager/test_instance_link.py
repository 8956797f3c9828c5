"""The manager's end of a manager link against an instance that asks for more than is good for others."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from uuid import uuid4

import pytest

from vtpm.manager import instance_link
from vtpm.manager.instance_link import InstanceLink
from vtpm.tpm.types import MAX_STATE_BYTES, InstanceId, StateKind, TpmVersion, VtpmId
from vtpm.wire.framing import BadFrame, Deframer, encode_frame
from vtpm.wire.manager_link import (
    MAX_BODY_BYTES,
    ClientKind,
    Direction,
    Hello,
    LinkPower,
    Load,
    Note,
    Ready,
    StateEnd,
    ToManager,
    decode_message,
    encode_message,
)

LIMIT_S = 30.0
LARGE = {StateKind.PERMANENT: bytes(MAX_STATE_BYTES)}


class _Vault:
    """Gives large state, and counts how often."""

    def __init__(self) -> None:
        self.loads = 0

    def load(self, *_: object) -> dict[StateKind, bytes]:
        self.loads += 1
        return LARGE


class _World:
    """A link whose instance is the test."""

    def __init__(self) -> None:
        self.vault = _Vault()
        self.changes: asyncio.Queue[str] = asyncio.Queue()
        self.condemned: asyncio.Queue[InstanceLink] = asyncio.Queue()
        self.sock, managers = socket.socketpair()
        self.sock.setblocking(False)
        self._deframer = Deframer(MAX_BODY_BYTES)
        self._came: list[bytes | BadFrame] = []
        self.link = InstanceLink(
            managers,
            "web1",
            VtpmId(uuid4()),
            InstanceId(uuid4()),
            TpmVersion.V2_0,
            self.vault,  # type: ignore[arg-type]
            lambda _, note: self.changes.put_nowait(note),
            self.condemned.put_nowait,
        )

    async def send(self, *messages: ToManager) -> None:
        for message in messages:
            await asyncio.get_running_loop().sock_sendall(self.sock, encode_frame(encode_message(message)))

    async def receive(self) -> object:
        """Return the manager's next message."""
        while not self._came:
            self._came += self._deframer.feed(await asyncio.get_running_loop().sock_recv(self.sock, 65536))
        body = self._came.pop(0)
        assert isinstance(body, bytes)
        return decode_message(body, Direction.TO_INSTANCE)

    async def begin(self) -> None:
        """Answer the hello."""
        hello = await self.receive()
        assert isinstance(hello, Hello)
        await self.send(Ready(hello.session, TpmVersion.V2_0, LinkPower.OFF, ClientKind.NONE, 0, 0))
        assert await self.changes.get() == ""

    async def taken(self, note: str) -> None:
        """Return when all that was sent has been followed."""
        await self.send(Note(note))
        while await self.changes.get() != note:
            pass


def _run(attack: Callable[[_World], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(LIMIT_S):
            world = _World()
            try:
                await world.begin()
                await attack(world)
            finally:
                world.link.close()
                world.sock.close()

    asyncio.run(run())


def test_instance_is_condemned_when_it_asks_for_more_than_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance_link, "_MAX_OUT_BYTES", MAX_STATE_BYTES // 2)

    async def attack(world: _World) -> None:
        await world.send(Load(1))
        assert await world.condemned.get() is world.link
        assert world.link.closed

    _run(attack)


def test_load_waits_for_its_turn_when_an_instance_loads_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance_link, "LOADS_BURST", 2)
    monkeypatch.setattr(instance_link, "LOADS_PER_S", 1 / LIMIT_S)

    async def attack(world: _World) -> None:
        for seq in (1, 2):
            await world.send(Load(seq))
            while not isinstance(await world.receive(), StateEnd):
                pass
        await world.send(Load(3))
        await world.taken("it asked a third time")
        await world.taken("and what follows a message is done")
        assert world.vault.loads == 2
        assert (world.link.complaints, world.condemned.empty()) == (0, True)

    _run(attack)


@pytest.mark.parametrize(
    ("flood", "name"), [(b"\xc0", "FRAMES"), (b"x", "BYTES")], ids=["borders alone", "a frame without end"]
)
def test_link_rests_for_as_long_as_it_has_sent_too_fast_when_bytes_come_without_end(
    monkeypatch: pytest.MonkeyPatch, flood: bytes, name: str
) -> None:
    monkeypatch.setattr(instance_link, f"{name}_BURST", 1000)
    monkeypatch.setattr(instance_link, f"{name}_PER_S", 50_000.0)

    async def attack(world: _World) -> None:
        began_s = time.monotonic()
        await asyncio.get_running_loop().sock_sendall(world.sock, flood * 65536)
        await world.taken("after it")
        # At half the rate for borders, of which each frame has two.
        assert time.monotonic() - began_s >= 0.5

    _run(attack)
