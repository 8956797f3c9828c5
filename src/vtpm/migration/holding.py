"""What a host has made durable about its right to run one vTPM, and which changes of it there are. Pure.

Of all hosts that know a vTPM, at most one is HELD. Epochs count the right's changes of hands: a move from epoch e makes
e + 1, an aborted one e + 2 at the source, so that no two holders ever share an epoch.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from vtpm.wire.migration import Mode


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
    """

    right: Right
    epoch: int = 0
    migration_id: bytes = b""
    peer: str = ""
    digest: bytes = b""
    mode: Mode = Mode.STOPPED

    @property
    def may_run(self) -> bool:
        """Whether an instance of it may exist here and answer commands."""
        return self.right is Right.HELD

    def is_of(self, peer: str, migration_id: bytes) -> bool:
        """Whether it came to be by this attempt with this host."""
        return (self.peer, self.migration_id) == (peer, migration_id)


NOWHERE = Holding(Right.ABSENT)
