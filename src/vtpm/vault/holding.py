"""What a host has made durable about its right to run one vTPM, and which changes of it there are. Pure.

Of all hosts that know a vTPM, at most one is HELD. Epochs count the right's changes of hands: a move from epoch e makes
e + 1, an aborted one e + 2 at the source, so that no two holders ever share an epoch. docs/state-format.md, "Holdings".
Imported by the stores, migration and the manager.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vtpm.errors import ConflictError, UsageError
from vtpm.tpm.types import VtpmId
from vtpm.vault.entries import number_field, octets_field
from vtpm.vault.merkle import EMPTY_LEAF, leaf_hash
from vtpm.vault.records import DIGEST_BYTES, MAX_COUNTER, valid_name
from vtpm.wire.migration import ID_BYTES, Mode

MAX_HOLDINGS = 100_000
MAX_ARRIVED = 10_000
"""Holdings beyond which nothing arrives any more, so that peers cannot keep this host's own vTPMs from leaving."""
MAX_INERT_OF_ONE = 256
"""vTPMs of one peer that may wait here for its word."""
MAX_ADOPTED = 16
_LABEL = b"vtpm holdings v1"


class Right(enum.Enum):
    """What this host may do with the vTPM."""

    ABSENT = "absent"
    """Nothing: it has never been here, or an inert state was discarded. epoch is the greatest known, or 0."""
    HELD = "held"
    """Run it."""
    FROZEN = "frozen"
    """Nothing until the move is over: its state may be under way."""
    MOVED = "moved"
    """Nothing ever again under this epoch: released to peer. Its key is destroyed. No migration_id: peer is active."""
    INERT = "inert"
    """Keep its state, run nothing, until the source says released or aborted."""


CRASH_RULES: Mapping[Right, str] = {
    Right.ABSENT: "an offer that was made is forgotten; the source hears a refusal and aborts",
    Right.HELD: "a proposal that was under way is forgotten; nothing had left",
    Right.FROZEN: "the destination is asked: it has stored the state, and is released; or refuses, and the move aborts",
    Right.MOVED: "the release is said again until the destination says that it is active",
    Right.INERT: "the source is asked: it has released, or aborted, or has not decided; nothing runs meanwhile",
}


@dataclass(frozen=True)
class Holding:
    """The durable record of one vTPM on one host; each change is anchored before any message that follows from it.

    Args:
        right: see Right.
        epoch: that this host runs it under (HELD, FROZEN), will run it under (INERT), or that has passed (MOVED: the
            destination's).
        migration_id: of the attempt that brought it here (HELD), or that is not over yet (FROZEN, MOVED, INERT); empty:
            none.
        peer: the other host of that attempt, as the transport names whom it has authenticated; empty: none.
        digest: SHA-256 of the sealed state of that attempt (FROZEN, INERT); empty: none.
        mode: of that attempt.
        adopted: ids, one after the other, of all attempts that an operator ended here by adopting the vTPM; never
            forgotten, for their sources may come back long after it went on from here.
    """

    right: Right
    epoch: int = 0
    migration_id: bytes = b""
    peer: str = ""
    digest: bytes = b""
    mode: Mode = Mode.STOPPED
    adopted: bytes = b""

    @property
    def may_run(self) -> bool:
        """Whether an instance of it may exist here and answer commands."""
        return self.right is Right.HELD

    def has_adopted(self, migration_id: bytes) -> bool:
        """Whether the vTPM was adopted here out of this attempt, whatever has become of it since."""
        ids = (self.adopted[at : at + ID_BYTES] for at in range(0, len(self.adopted), ID_BYTES))
        return migration_id in ids

    def is_of(self, peer: str, migration_id: bytes) -> bool:
        """Whether it came to be by this attempt with this host."""
        return (self.peer, self.migration_id) == (peer, migration_id)


NOWHERE = Holding(Right.ABSENT)

_CHANGES: Mapping[tuple[Right, Right], int | None] = {
    (Right.HELD, Right.FROZEN): 0,
    (Right.FROZEN, Right.HELD): 2,
    (Right.FROZEN, Right.MOVED): 1,
    (Right.MOVED, Right.MOVED): 0,
    (Right.ABSENT, Right.INERT): None,
    (Right.MOVED, Right.INERT): None,
    (Right.INERT, Right.HELD): 0,
    (Right.INERT, Right.ABSENT): 0,
}
"""Which changes there are, and by how much each raises the epoch; None: above all that this host has known."""


@dataclass(frozen=True)
class KnownVtpm:
    """What this host holds of a vTPM that has moved, or is moving: also of one that is in its registry no more.

    Args:
        name: that it has or had here.
    """

    vtpm_id: VtpmId
    name: str
    holding: Holding


def check_change(before: Holding, after: Holding) -> None:
    """Raise ConflictError unless a host may go from one holding to the other, whoever asks."""
    change = (before.right, after.right)
    step = _CHANGES.get(change)
    raised = after.epoch - before.epoch
    # What comes back to a host that it moved from may have the very epoch that it was released with, plus one.
    if change not in _CHANGES or (raised != step if step is not None else raised < 1):
        raise ConflictError(
            f"a vTPM that is {before.right.value} under epoch {before.epoch} does not become {after.right.value} under"
            f" {after.epoch}"
        )
    if not after.adopted.startswith(before.adopted):
        raise ConflictError("out of which attempts a vTPM was adopted is never forgotten")


def check_holding(name: object, holding: Holding) -> None:
    """Raise UsageError unless all fields are within their bounds; the vTPM's name is for the message."""
    if not 0 <= holding.epoch <= MAX_COUNTER:
        raise UsageError(f"vTPM {name}: epoch {holding.epoch} is out of bounds")
    if len(holding.migration_id) not in (0, ID_BYTES) or len(holding.digest) not in (0, DIGEST_BYTES):
        raise UsageError(f"vTPM {name}: an attempt's id or digest is of another size")
    if len(holding.adopted) % ID_BYTES or len(holding.adopted) > MAX_ADOPTED * ID_BYTES:
        raise UsageError(f"vTPM {name}: it was adopted more than {MAX_ADOPTED} times")
    if holding.peer:
        valid_name(holding.peer)


def holdings_leaf(known: Sequence[KnownVtpm]) -> bytes:
    """Return what stands for all holdings in the tree; that of none is the empty leaf.

    Args:
        known: by uuid, ascending.
    """
    if not known:
        return EMPTY_LEAF
    fields = [octets_field(_LABEL), number_field(len(known))]
    for one in known:
        holding = one.holding
        fields += [
            octets_field(one.vtpm_id.bytes),
            octets_field(one.name.encode()),
            octets_field(holding.right.value.encode()),
            number_field(holding.epoch),
            octets_field(holding.migration_id),
            octets_field(holding.peer.encode()),
            octets_field(holding.digest),
            number_field(holding.mode.value),
            octets_field(holding.adopted),
        ]
    return leaf_hash(b"".join(fields))
