"""The blobs of a live move arrive whole, in order, with their digest, or not at all."""

from __future__ import annotations

import os
from itertools import chain
from typing import Any

import pytest

from vtpm.errors import ProtocolError
from vtpm.wire.manager_link import MAX_CHUNK_BYTES, Arrive, Depart, Departed, MovePart, SealedPart
from vtpm.wire.manager_link_moves import BlobReceiver, move_messages, sealed_messages

DATA = os.urandom(2 * MAX_CHUNK_BYTES + 5)


CUT = {
    Depart: list(move_messages(Depart, 7, DATA)),
    Arrive: list(move_messages(Arrive, 7, DATA)),
    Departed: list(sealed_messages(7, DATA)),
}


@pytest.mark.parametrize(("head", "part"), [(Depart, MovePart), (Arrive, MovePart), (Departed, SealedPart)])
def test_a_blob_arrives_whole_when_its_messages_come_in_order(head: type[Any], part: type[Any]) -> None:
    messages = CUT[head]
    receiver = BlobReceiver()
    assert [type(one) for one in messages] == [head, part, part, part]
    assert [receiver.receive(one) for one in messages[:-1]] == [None, None, None]
    completed = receiver.receive(messages[-1])
    assert completed is not None
    assert (completed.head, completed.data) == (messages[0], DATA)


def test_a_blob_begins_again_when_its_head_is_repeated() -> None:
    messages = list(move_messages(Depart, 7, DATA))
    receiver = BlobReceiver()
    results = [receiver.receive(one) for one in chain(messages[:2], messages)]
    assert results[-1] is not None
    assert results[-1].data == DATA


@pytest.mark.parametrize(
    "part", [MovePart(7, 1, b"x"), MovePart(8, 0, b"x"), SealedPart(7, MAX_CHUNK_BYTES, b"x")], ids=str
)
def test_a_part_is_refused_when_it_is_out_of_order(part: MovePart | SealedPart) -> None:
    receiver = BlobReceiver()
    head, first, *_ = move_messages(Depart, 7, DATA)
    receiver.receive(head)
    with pytest.raises(ProtocolError, match="out of order"):
        receiver.receive(part)
    with pytest.raises(ProtocolError, match="out of order"):
        receiver.receive(first)


def test_a_part_is_refused_when_there_is_more_than_was_announced() -> None:
    receiver = BlobReceiver()
    receiver.receive(Depart(7, 2, bytes(32)))
    with pytest.raises(ProtocolError, match="larger than the 2 bytes announced"):
        receiver.receive(MovePart(7, 0, b"xyz"))
    with pytest.raises(ProtocolError, match="out of order"):
        receiver.receive(MovePart(7, 0, b"xy"))


def test_a_blob_is_refused_when_its_digest_does_not_fit() -> None:
    receiver = BlobReceiver()
    receiver.receive(Arrive(7, 1, bytes(32)))
    with pytest.raises(ProtocolError, match="digest"):
        receiver.receive(MovePart(7, 0, b"x"))


def test_a_blob_is_refused_when_it_is_empty() -> None:
    receiver = BlobReceiver()
    with pytest.raises(ProtocolError, match="empty"):
        receiver.receive(Departed(7, 0, bytes(32)))
    with pytest.raises(ProtocolError, match="out of order"):
        receiver.receive(SealedPart(7, 0, b"x"))
