"""However long no manager reads, little waits for it, and what waits is what a manager needs to know."""

from __future__ import annotations

import pytest

from tests.support.vtpmd import Vtpmd
from vtpm.instance.outbox import MAX_NOTES, Outbox
from vtpm.wire.framing import Deframer
from vtpm.wire.manager_link import (
    MAX_BODY_BYTES,
    ClientChanged,
    ClientKind,
    Direction,
    Done,
    LinkPower,
    Load,
    LockoutChanged,
    Note,
    PowerChanged,
    ToManager,
    decode_message,
)


def _read(outbox: Outbox, piece: int = 1 << 20) -> list[ToManager]:
    deframer = Deframer(MAX_BODY_BYTES)
    messages = []
    while outbox:
        sent = bytes(outbox.head[:piece])
        outbox.sent(len(sent))
        for body in deframer.feed(sent):
            assert isinstance(body, bytes)
            messages.append(decode_message(body, Direction.TO_MANAGER))
    return messages


def test_the_last_of_each_fact_is_left_in_order_when_nobody_reads() -> None:
    outbox = Outbox()
    locked, free = LockoutChanged(True, 3, 3, 10, 5), LockoutChanged(False, 0, 3, 10, 0)
    for number in range(1000):
        outbox.put(PowerChanged(LinkPower.FAILED, str(number)))
        outbox.put(ClientChanged(ClientKind.DATA, number, 0))
        outbox.put(locked)
    outbox.put(PowerChanged(LinkPower.ON, "at last"))
    outbox.put(Done(1, "", ""))
    outbox.put(free)
    assert _read(outbox) == [
        ClientChanged(ClientKind.DATA, 999, 0),
        PowerChanged(LinkPower.ON, "at last"),
        Done(1, "", ""),
        free,
    ]


@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_notes_are_counted_instead_of_kept_when_there_are_many(piece: int) -> None:
    outbox = Outbox()
    for number in range(MAX_NOTES + 5):
        outbox.put(Note(str(number)))
    notes = _read(outbox, piece)
    assert notes[:-1] == [Note(str(number)) for number in range(MAX_NOTES)]
    assert notes[-1] == Note("5 more notes were dropped, for no manager read them")
    outbox.put(Note("again"))
    assert _read(outbox, piece) == [Note("again")]


def test_what_has_begun_to_leave_leaves_whole_when_the_rest_is_dropped() -> None:
    outbox = Outbox()
    loads = [Load(1), Load(2), Load(3)]
    first = PowerChanged(LinkPower.ON, "first")
    outbox.put(first)
    begun = bytes(outbox.head[:3])
    outbox.sent(3)
    outbox.ask(loads)
    outbox.put(PowerChanged(LinkPower.OFF, "second"))
    outbox.give_up(loads[1:])
    rest = b""
    while outbox:
        rest += outbox.head
        outbox.sent(len(outbox.head))
    bodies = Deframer(MAX_BODY_BYTES).feed(begun + rest)
    assert [decode_message(bytes(body), Direction.TO_MANAGER) for body in bodies if isinstance(body, bytes)] == [
        first,
        loads[0],
        PowerChanged(LinkPower.OFF, "second"),
    ]
    outbox.put(first)
    outbox.clear()
    assert not outbox


@pytest.mark.timeout(60)
def test_memory_stays_bounded_when_clients_come_and_the_manager_does_not_read(vtpmd: Vtpmd) -> None:
    clients = 40_000
    vtpmd.manager.pause()
    before = vtpmd.resident_bytes()
    for _ in range(clients):
        vtpmd.connect("data").close()
    # Each is told of: as many messages as would be several times this much. Buffers of the allocator take up to 3 MB.
    assert vtpmd.resident_bytes() - before < 6_000_000
    vtpmd.manager.go_on()
    vtpmd.manager.hello()
