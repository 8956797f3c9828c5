"""Raw clients that write NV at once, from one thread: each on its own connection, one command under way on each."""

from __future__ import annotations

import itertools
import select
import socket
import time
from collections.abc import Sequence

from bench.client import TIMEOUT_S, Exchange, RawClient, succeed
from bench.commands import NV_DEFINE, nv_write

_counter = itertools.count(1)
_RESPONSE_BYTES = 4096


def next_write() -> bytes:
    """Return an NV_Write that differs from all before, so that it is a save."""
    return nv_write(next(_counter))


def prepare(exchange: Exchange) -> None:
    """Define the index that is written."""
    succeed(exchange, NV_DEFINE)


def write_for(clients: Sequence[RawClient], duration_s: float, period_s: float = 0.0) -> list[float]:
    """Have all of them write for some time; return how long each save took, in seconds.

    Args:
        period_s: from the beginning of one client's write to that of its next, unless it is answered later; 0: the next
            comes when the last is answered. The clients begin evenly spread over it.
    Raises:
        RuntimeError: a write was refused, or not answered in TIMEOUT_S.
    """
    clock = time.perf_counter
    poller = select.poll()
    socks = {client.sock.fileno(): client.sock for client in clients}
    for fd in socks:
        poller.register(fd, select.POLLIN)
    begin = clock()
    due = {fd: begin + period_s * place / len(socks) for place, fd in enumerate(socks)}
    sent: dict[int, float] = {}
    times: list[float] = []
    end = begin + duration_s
    while (now := clock()) < end or sent:
        for fd, at in due.items():
            if fd not in sent and at <= now < end:
                sent[fd] = clock()
                socks[fd].send(next_write())
        idle = [at for fd, at in due.items() if fd not in sent]
        wait_s = TIMEOUT_S if sent and (now >= end or not idle) else max(0.0, min([end, *idle]) - clock())
        ready = poller.poll(wait_s * 1000)
        if not ready and wait_s == TIMEOUT_S:
            raise RuntimeError(f"{len(sent)} writes were not answered within {TIMEOUT_S} s")
        for fd, _ in ready:
            times.append(_take(socks[fd], sent.pop(fd)))
            due[fd] = max(due[fd] + period_s, clock())
    return times


def _take(sock: socket.socket, sent_at: float) -> float:
    response = sock.recv(_RESPONSE_BYTES)
    took_s = time.perf_counter() - sent_at
    if response[6:10] != bytes(4):
        raise RuntimeError(f"a write was answered with {response[:10].hex()}")
    return took_s
