"""Messages between two managers that move a vTPM, each the body of one frame. Pure.

A body is u8 version, u8 type, u16 zero, u32 zero, fields; big-endian. docs/migration.md has the tables and the order of
messages. For the migration machines and their transport, which knows who a message is from.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from vtpm.wire.fields import Field, choice, fixed, number, rest, sized, text, uuid
from vtpm.wire.message_codec import HEADER, UNNUMBERED, Layout, MessageCodec

MIGRATION_VERSION = 1
ID_BYTES = 16
NONCE_BYTES = 32
DIGEST_BYTES = 32
MAX_EPOCH = 2**62
"""Of a vTPM that moves: whatever a peer says, the epochs that follow are numbers that every store keeps."""
MAX_KEY_BYTES = 2048
"""Bound on a destination's public key with the proof of where it lives."""
MAX_EVIDENCE_BYTES = 1024 * 1024
"""Bound on a platform's evidence: quote, certificates, event logs."""
MAX_SEALED_BYTES = 1024 * 1024
"""Bound on a vTPM's sealed state; libtpms' is about 180 KB at most, both kinds together."""
MAX_REASON_BYTES = 200
MAX_BODY_BYTES = HEADER.size + 64 + MAX_KEY_BYTES + MAX_EVIDENCE_BYTES + ID_BYTES + 2 * NONCE_BYTES


class Direction(enum.Enum):
    """Who sent a message."""

    TO_DESTINATION = "source to destination"
    TO_SOURCE = "destination to source"


class Mode(enum.Enum):
    """What tells the source that the right may go over, once the destination has the state."""

    STOPPED = 1
    """Nothing more: the vTPM does not run."""
    DRIVEN = 2
    """Whoever drives both QEMUs: the source's has completed, and the destination's is paused."""
    FOREIGN = 3
    """The destination's guest: it has sent its first TPM command there."""


@dataclass(frozen=True)
class Propose:
    """Source: may this vTPM move to you? Fields: nonce, fresh for each proposal; epoch, that it has at the source."""

    vtpm_id: UUID
    vm_id: UUID
    epoch: int
    mode: Mode
    nonce: bytes


@dataclass(frozen=True)
class Offer:
    """Destination: yes, if you believe this. Answers the proposal with this digest.

    Fields: migration_id, fresh and random, names this one attempt from here on; nonce, for the source's evidence; key,
    to which the state is to be sealed; evidence over all of this and the proposal.
    """

    migration_id: bytes
    proposal: bytes
    nonce: bytes
    key: bytes
    evidence: bytes


@dataclass(frozen=True)
class Decline:
    """Destination: no, to the proposal with this digest. Nothing was kept."""

    proposal: bytes
    reason: str


@dataclass(frozen=True)
class Prove:
    """Source: what I am, over all that the destination said, and the digest of a secret that the state comes with."""

    migration_id: bytes
    commitment: bytes
    evidence: bytes


@dataclass(frozen=True)
class State:
    """Source: the vTPM's state, for the key of the offer alone. The source is frozen."""

    migration_id: bytes
    sealed: bytes


@dataclass(frozen=True)
class Stored:
    """Destination: the state with this digest of its sealed form is durable here, inert."""

    migration_id: bytes
    digest: bytes


@dataclass(frozen=True)
class Refuse:
    """Destination: I hold no state of this attempt, and will not."""

    migration_id: bytes
    reason: str


@dataclass(frozen=True)
class Ask:
    """Source: what has become of this attempt?"""

    migration_id: bytes


@dataclass(frozen=True)
class Release:
    """Source: the right to run it is yours; here is nothing left but a tombstone."""

    migration_id: bytes


@dataclass(frozen=True)
class Activated:
    """Destination: I hold the right; you need not tell me again."""

    migration_id: bytes


@dataclass(frozen=True)
class Query:
    """Destination: I am inert with this digest; what has become of it? wanted: its guest has sent a command here."""

    migration_id: bytes
    digest: bytes
    wanted: bool = False


@dataclass(frozen=True)
class Aborted:
    """Source: this attempt has ended without a move and can never release; what you hold of it is worthless."""

    migration_id: bytes


FromSource = Propose | Prove | State | Ask | Release | Aborted
FromDestination = Offer | Decline | Stored | Refuse | Activated | Query
MigrationMessage = FromSource | FromDestination

_ID = fixed(ID_BYTES)
_DIGEST = fixed(DIGEST_BYTES)
_NONCE = fixed(NONCE_BYTES)
_REASON = text(MAX_REASON_BYTES)


def _from_source(code: int, **fields: Field) -> Layout:
    return Layout(code, Direction.TO_DESTINATION, fields)


def _from_destination(code: int, **fields: Field) -> Layout:
    return Layout(code, Direction.TO_SOURCE, fields)


_LAYOUTS: Mapping[type[Any], Layout] = {
    Propose: _from_source(
        0x01,
        vtpm_id=uuid(),
        vm_id=uuid(),
        epoch=number("Q", 1, MAX_EPOCH),
        mode=choice("B", {mode: mode.value for mode in Mode}),
        nonce=_NONCE,
    ),
    Offer: _from_destination(
        0x02,
        migration_id=_ID,
        proposal=_DIGEST,
        nonce=_NONCE,
        key=sized(MAX_KEY_BYTES, 1),
        evidence=rest(MAX_EVIDENCE_BYTES),
    ),
    Decline: _from_destination(0x03, proposal=_DIGEST, reason=_REASON),
    Prove: _from_source(0x04, migration_id=_ID, commitment=_DIGEST, evidence=rest(MAX_EVIDENCE_BYTES)),
    State: _from_source(0x05, migration_id=_ID, sealed=rest(MAX_SEALED_BYTES, 1)),
    Stored: _from_destination(0x06, migration_id=_ID, digest=_DIGEST),
    Refuse: _from_destination(0x07, migration_id=_ID, reason=_REASON),
    Ask: _from_source(0x08, migration_id=_ID),
    Release: _from_source(0x09, migration_id=_ID),
    Activated: _from_destination(0x0A, migration_id=_ID),
    Query: _from_destination(0x0B, migration_id=_ID, digest=_DIGEST, wanted=choice("B", {False: 0, True: 1})),
    Aborted: _from_source(0x0C, migration_id=_ID),
}

_CODEC = MessageCodec[MigrationMessage]("a migration message", MIGRATION_VERSION, MAX_BODY_BYTES, UNNUMBERED, _LAYOUTS)


def encode_message(message: MigrationMessage) -> bytes:
    """Return the body of a message. Raises ProtocolError: a field is out of its bounds."""
    return _CODEC.encode(message)


def decode_message(body: bytes, direction: Direction) -> MigrationMessage:
    """Read the body of a message that came from one direction.

    Raises:
        ProtocolError: it is not exactly a message of that direction with all its fields within bounds.
    """
    return _CODEC.decode(body, direction)
