"""The blobs of a live move on the manager link: cut into messages, and put together again. Pure.

Volatile state and a sealed state go to the manager with Depart and Arrive, a sealed one comes from it with Departed.
State in the clear comes as the answer to a Load does (`manager_link_peers`). May be imported by everyone.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass, field

from vtpm.errors import ProtocolError
from vtpm.wire.manager_link import MAX_CHUNK_BYTES, Arrive, Depart, Departed, MovePart, SealedPart


def move_messages(head: type[Depart] | type[Arrive], seq: int, data: bytes) -> Iterator[Depart | Arrive | MovePart]:
    """Cut what goes to the manager, of 1 to MAX_SEALED_BYTES bytes, into messages."""
    yield head(seq, len(data), _digest(data))
    for offset in range(0, len(data), MAX_CHUNK_BYTES):
        yield MovePart(seq, offset, data[offset : offset + MAX_CHUNK_BYTES])


def sealed_messages(seq: int, data: bytes) -> Iterator[Departed | SealedPart]:
    """Cut the answer to a Depart, of 1 to MAX_SEALED_BYTES bytes, into messages."""
    yield Departed(seq, len(data), _digest(data))
    for offset in range(0, len(data), MAX_CHUNK_BYTES):
        yield SealedPart(seq, offset, data[offset : offset + MAX_CHUNK_BYTES])


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@dataclass(frozen=True)
class CompletedBlob:
    """A blob of which all has come, and whose digest fits."""

    head: Depart | Arrive | Departed
    data: bytes = field(repr=False)


class BlobReceiver:
    """Puts the blobs of one direction together, one after the other.

    What is out of order is refused; no blob is under way after that, and the next must begin with its head.
    """

    def __init__(self) -> None:
        self._head: Depart | Arrive | Departed | None = None
        self._data = bytearray()

    def receive(self, message: Depart | Arrive | Departed | MovePart | SealedPart) -> CompletedBlob | None:
        """Take a message; return the blob if it is complete by it.

        Raises:
            ProtocolError: out of order, of another question, empty, larger than announced, or of another digest.
        """
        if isinstance(message, MovePart | SealedPart):
            head = self._take(message)
        else:
            head = self._begin(message)
        if len(self._data) < head.total:
            return None
        data = bytes(self._data)
        self._reset()
        if not hmac.compare_digest(_digest(data), head.digest):
            raise ProtocolError(f"the blob of question {head.seq} does not have the digest that it came with")
        return CompletedBlob(head, data)

    def _begin(self, head: Depart | Arrive | Departed) -> Depart | Arrive | Departed:
        # Also one that is repeated after a new Hello begins again.
        self._reset()
        if head.total == 0:
            raise ProtocolError(f"the blob of question {head.seq} is empty")
        self._head = head
        return head

    def _take(self, part: MovePart | SealedPart) -> Depart | Arrive | Departed:
        head = self._head
        if head is None or part.seq != head.seq or part.offset != len(self._data):
            self._reset()
            raise ProtocolError(f"a part of the blob of question {part.seq} at {part.offset} is out of order")
        if part.offset + len(part.data) > head.total:
            self._reset()
            raise ProtocolError(f"the blob of question {part.seq} is larger than the {head.total} bytes announced")
        self._data += part.data
        return head

    def _reset(self) -> None:
        self._head = None
        self._data.clear()
