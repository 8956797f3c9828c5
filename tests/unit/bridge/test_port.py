"""The port tells whoever waits for room in it, however the room came to be."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from tests.unit.bridge.world import run
from vtpm.bridge.port import Port
from vtpm.wire.framing import encode_frame
from vtpm.wire.launcher_port import CHUNK_BYTES, Data, Direction, Message, Taken, encode_message

pytestmark = pytest.mark.timeout(30)


def test_room_is_told_when_what_is_sent_meanwhile_takes_the_last_along() -> None:
    async def test() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.setblocking(False)
            room = asyncio.Event()

            def answer(_: Message) -> None:
                # Called for what has come, which the loop does before it writes to the same socket.
                port.send(Taken(1, 1))
                assert not port.congested

            port = Port(ours.fileno(), Direction.TO_MANAGER, answer, pytest.fail, room.set, room.clear)
            while not port.congested:
                port.send(Data(1, bytes(CHUNK_BYTES)))
            # All at once: it reads what there is, and sends something.
            with contextlib.suppress(BlockingIOError):
                while theirs.recv(CHUNK_BYTES):
                    pass
            theirs.send(encode_frame(encode_message(Data(1, b"x"), Direction.TO_LAUNCHER)))
            await room.wait()
            port.close()

    run(test)
