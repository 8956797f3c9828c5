"""Migration messages: what is taken is a message, from the side that may send it, in its one form."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import spoiled
from tests.unit.wire.migration_examples import MIGRATION_EXAMPLES
from vtpm.errors import ProtocolError
from vtpm.wire.migration import Direction, decode_message, encode_message

_EXAMPLES = st.sampled_from(list(MIGRATION_EXAMPLES.values()))


@effort.codec
@given(spoiled(_EXAMPLES.map(encode_message)), st.sampled_from(Direction))
def test_spoiled_message_is_refused_or_is_another_valid_one(body: bytes, direction: Direction) -> None:
    try:
        message = decode_message(body, direction)
    except ProtocolError:
        return
    assert encode_message(message) == body


@effort.codec
@given(st.integers(0, 15), st.binary(max_size=200), st.sampled_from(Direction))
def test_noise_is_refused_or_is_a_message(code: int, noise: bytes, direction: Direction) -> None:
    body = bytes((1, code, 0, 0, 0, 0, 0, 0)) + noise
    try:
        message = decode_message(body, direction)
    except ProtocolError:
        return
    assert encode_message(message) == body
