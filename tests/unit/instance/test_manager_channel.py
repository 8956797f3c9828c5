"""The instance's end of the manager link: who reads it, and what becomes of what is read."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator

import pytest

from vtpm.errors import StoreError, UnavailableError
from vtpm.instance.manager_channel import ManagerChannel
from vtpm.tpm.types import StateKind
from vtpm.wire.framing import Deframer, encode_frame
from vtpm.wire.manager_link import (
    MAX_BODY_BYTES,
    SESSION_BYTES,
    Direction,
    Hello,
    Retry,
    Saved,
    SaveError,
    ToInstance,
    decode_message,
    encode_message,
)

LIMIT_S = 20.0


class World:
    """A channel, its manager's end, and a TPM thread that saves once."""

    def __init__(self) -> None:
        self.manager, self.ours = socket.socketpair()
        self.manager.settimeout(LIMIT_S)
        self.posted: deque[Callable[[], None]] = deque()
        self.requests: list[object] = []
        self.complaints: list[str] = []
        self.channel = ManagerChannel(
            self.ours.fileno(), self.requests.append, self.posted.append, self.complaints.append
        )
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._save)

    def begin_save(self) -> None:
        """Begin a save, and return when all of it has come at the manager."""
        self._thread.start()
        deframer, got = Deframer(MAX_BODY_BYTES), 0
        while got < 2:
            for body in deframer.feed(self.manager.recv(65536)):
                assert isinstance(body, bytes)
                decode_message(body, Direction.TO_MANAGER)
                got += 1

    def end_save(self) -> None:
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()

    def send(self, message: ToInstance) -> None:
        self.manager.sendall(encode_frame(encode_message(message)))

    def main_is_woken(self) -> bool:
        poller = select.poll()
        poller.register(self.channel, select.POLLIN)
        return bool(poller.poll(0))

    def run_posted(self) -> None:
        while self.posted:
            self.posted.popleft()()

    def _save(self) -> None:
        try:
            self.channel.save(StateKind.PERMANENT, b"state", None)
        except BaseException as error:
            self.error = error


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.manager.close()
    made.ours.close()
    made.channel._watched.close()
    os.close(made.channel._answered)


def test_answer_wakes_the_saving_thread_alone_when_it_comes(world: World) -> None:
    world.begin_save()
    world.send(Saved(1))
    world.end_save()
    assert world.error is None
    assert not world.main_is_woken()


def test_refusal_fails_the_save_when_it_comes(world: World) -> None:
    world.begin_save()
    world.send(SaveError(1, Retry.FINAL, "store", "the disk is full"))
    world.end_save()
    assert isinstance(world.error, StoreError)


def test_answer_ends_the_wait_when_the_main_thread_has_read_it(world: World) -> None:
    world.begin_save()
    # As a main thread does that was woken just before the save began.
    with world.channel._reading:
        world.send(Saved(1))
        data = world.ours.recv(65536)
        for body in world.channel._deframer.feed(data):
            assert isinstance(body, bytes)
            world.channel._receive(body)
    world.end_save()
    assert world.error is None


def test_requests_reach_the_main_thread_in_order_when_they_come_during_a_save(world: World) -> None:
    world.begin_save()
    first, second = Hello(bytes(SESSION_BYTES)), Hello(bytes([1]) * SESSION_BYTES)
    world.send(first)
    world.send(second)
    world.send(Saved(1))
    world.end_save()
    assert world.requests == []
    world.run_posted()
    assert world.requests == [first, second]


def test_answer_to_another_save_is_ignored_when_one_is_under_way(world: World) -> None:
    world.begin_save()
    world.send(Saved(7))
    world.send(Saved(1))
    world.end_save()
    assert world.error is None


def test_save_fails_and_main_thread_hears_when_the_link_ends(world: World) -> None:
    world.begin_save()
    world.manager.close()
    world.end_save()
    assert isinstance(world.error, UnavailableError)
    assert world.main_is_woken()
    assert not world.channel.on_ready()


def test_open_save_is_sent_again_when_another_manager_says_hello(world: World) -> None:
    world.begin_save()
    world.channel.repeat()
    assert world.main_is_woken()
    assert world.channel.on_ready()
    assert world.manager.recv(65536)
    world.send(Saved(1))
    world.end_save()
    assert world.error is None
