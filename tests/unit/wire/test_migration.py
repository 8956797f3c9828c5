"""The codec of migration messages takes exactly its own messages."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from tests.unit.wire.migration_examples import DIGEST, MIGRATION_EXAMPLES, MIGRATION_ID, NONCE
from vtpm.errors import ProtocolError
from vtpm.wire import migration as mg
from vtpm.wire.migration import Direction, decode_message, encode_message

DESTINATIONS = (mg.Offer, mg.Decline, mg.Stored, mg.Refuse, mg.Activated, mg.Query)
OPEN_ENDED = (mg.Offer, mg.Prove, mg.State)
"""Their last field takes all that is left."""


def direction_of(message: mg.MigrationMessage) -> Direction:
    return Direction.TO_SOURCE if isinstance(message, DESTINATIONS) else Direction.TO_DESTINATION


@pytest.mark.parametrize("message", MIGRATION_EXAMPLES.values(), ids=MIGRATION_EXAMPLES)
class TestEveryMessage:
    def test_comes_back_when_decoded_from_its_own_side_alone(self, message: mg.MigrationMessage) -> None:
        body, direction = encode_message(message), direction_of(message)
        assert decode_message(body, direction) == message
        (other,) = set(Direction) - {direction}
        with pytest.raises(ProtocolError, match="unknown from"):
            decode_message(body, other)

    def test_is_refused_when_the_header_differs(self, message: mg.MigrationMessage) -> None:
        body, direction = encode_message(message), direction_of(message)
        for at, value, why in ((0, 2, "version 2"), (1, 0x7F, "0x7f"), (2, 1, "reserved"), (7, 1, "where it must not")):
            bad = bytearray(body)
            bad[at] = value
            with pytest.raises(ProtocolError, match=why):
                decode_message(bytes(bad), direction)

    def test_is_refused_when_cut_or_longer(self, message: mg.MigrationMessage) -> None:
        body, direction = encode_message(message), direction_of(message)
        least = len(body) - (len(b"a quote") if isinstance(message, OPEN_ENDED) else 0)
        for length in range(min(least, len(body))):
            if isinstance(message, mg.State) and length > mg.HEADER.size + mg.ID_BYTES:
                continue
            with pytest.raises(ProtocolError):
                decode_message(body[:length], direction)
        if not isinstance(message, OPEN_ENDED):
            with pytest.raises(ProtocolError, match="too many"):
                decode_message(body + b"\0", direction)


def test_bytes_are_as_documented_when_encoded() -> None:
    query = mg.Query(MIGRATION_ID, DIGEST, wanted=True)
    assert encode_message(query) == b"\x01\x0b\0\0\0\0\0\0" + MIGRATION_ID + DIGEST + b"\x01"
    offer = mg.Offer(MIGRATION_ID, DIGEST, NONCE, b"key", b"evidence")
    assert encode_message(offer) == (
        b"\x01\x02\0\0\0\0\0\0" + MIGRATION_ID + DIGEST + NONCE + struct.pack(">I", 3) + b"keyevidence"
    )
    propose = MIGRATION_EXAMPLES["propose"]
    assert isinstance(propose, mg.Propose)
    assert encode_message(propose) == (
        b"\x01\x01\0\0\0\0\0\0"
        + propose.vtpm_id.bytes
        + propose.vm_id.bytes
        + struct.pack(">QB", 7, mg.Mode.DRIVEN.value)
        + NONCE
    )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("propose", {"epoch": 0}),
        ("propose", {"epoch": mg.MAX_EPOCH + 1}),
        ("propose", {"nonce": NONCE[1:]}),
        ("offer", {"migration_id": b""}),
        ("offer", {"key": b""}),
        ("offer", {"key": bytes(mg.MAX_KEY_BYTES + 1)}),
        ("offer", {"evidence": bytes(mg.MAX_EVIDENCE_BYTES + 1)}),
        ("state", {"sealed": b""}),
        ("state", {"sealed": bytes(mg.MAX_SEALED_BYTES + 1)}),
        ("stored", {"digest": DIGEST + b"\0"}),
    ],
)
def test_message_is_not_sent_when_a_field_is_out_of_bounds(name: str, change: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        encode_message(dataclasses.replace(MIGRATION_EXAMPLES[name], **change))


def test_key_is_refused_when_its_length_is_wrong() -> None:
    body = bytearray(encode_message(MIGRATION_EXAMPLES["offer"]))
    at = mg.HEADER.size + mg.ID_BYTES + mg.DIGEST_BYTES + mg.NONCE_BYTES
    for length in (0, mg.MAX_KEY_BYTES + 1, 2**32 - 1, 200):
        body[at : at + 4] = struct.pack(">I", length)
        with pytest.raises(ProtocolError, match="field key"):
            decode_message(bytes(body), Direction.TO_SOURCE)


def test_largest_messages_pass_when_at_their_bounds() -> None:
    for message in (
        mg.Offer(MIGRATION_ID, DIGEST, NONCE, bytes(mg.MAX_KEY_BYTES), bytes(mg.MAX_EVIDENCE_BYTES)),
        mg.State(MIGRATION_ID, bytes(mg.MAX_SEALED_BYTES)),
    ):
        body = encode_message(message)
        assert len(body) <= mg.MAX_BODY_BYTES
        assert decode_message(body, direction_of(message)) == message
    with pytest.raises(ProtocolError, match="bytes"):
        decode_message(bytes(mg.MAX_BODY_BYTES + 1), Direction.TO_SOURCE)


def test_all_types_have_an_example_when_counted() -> None:
    assert [encode_message(message)[1] for message in MIGRATION_EXAMPLES.values()] == [*range(1, 13)]
