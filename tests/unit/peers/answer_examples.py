"""One answer of each kind, and those at the bounds."""

from __future__ import annotations

from vtpm.errors import AttestationError, VtpmError
from vtpm.peers.answers import MAX_MESSAGE_BYTES, MAX_MESSAGES, encode_error, encode_messages

ANSWER_EXAMPLES = {
    "nothing to say": encode_messages([]),
    "one message": encode_messages([b"hello"]),
    "as many as there can be": encode_messages([bytes([number]) * (number + 1) for number in range(MAX_MESSAGES)]),
    "an error": encode_error(AttestationError("host a is not what policy asks for", next_step="Look at its PCRs")),
    "an error of few words": encode_error(VtpmError("")),
}
LARGEST_MESSAGE = bytes(MAX_MESSAGE_BYTES)
