"""The benchmark's clients that write at once: all are served, at their pace, and a refusal is no result."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench.client import RawClient
from bench.writers import next_write, write_for

SUCCESS = bytes.fromhex("8002 00000013 00000000") + bytes(9)
FAILURE = bytes.fromhex("8001 0000000a 00000101")
Serve = Callable[[bytes], RawClient]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Return a new client of a new server that answers everything alike."""
    with contextlib.ExitStack() as stack:

        def serve(answer: bytes) -> RawClient:
            path = tmp_path / f"{len(threads)}"
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(str(path))
            listener.listen()
            threads.append(threading.Thread(target=_answer, args=(listener, answer)))
            threads[-1].start()
            client = RawClient(path)
            stack.callback(client.close)
            return client

        threads: list[threading.Thread] = []
        yield serve
    for thread in threads:
        thread.join(10)


def _answer(listener: socket.socket, answer: bytes) -> None:
    connection, _ = listener.accept()
    # A client that closes with an answer unread resets the connection.
    with connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while connection.recv(4096):
            connection.send(answer)


def test_no_two_writes_are_the_same() -> None:
    assert len({next_write() for _ in range(100)}) == 100


def test_clients_keep_their_pace_when_they_have_one(serve: Serve) -> None:
    clients = [serve(SUCCESS) for _ in range(3)]
    times = write_for(clients, 0.3, 0.1)
    # Each begins within the first period.
    assert 3 <= len(times) <= 9
    assert all(time_s > 0 for time_s in times)


def test_more_is_written_when_there_is_no_pace(serve: Serve) -> None:
    assert len(write_for([serve(SUCCESS)], 0.3)) > 9


def test_writing_fails_when_a_write_is_refused(serve: Serve) -> None:
    with pytest.raises(RuntimeError, match="8001"):
        write_for([serve(SUCCESS), serve(FAILURE)], 0.3)
