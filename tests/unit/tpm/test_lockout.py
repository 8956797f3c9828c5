"""What a TPM says of its lockout is read whole, or refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import spoiled
from vtpm.errors import ProtocolError
from vtpm.tpm.lockout import GET_LOCKOUT, Lockout, parse_lockout

IN_LOCKOUT = 0x200
LOCKED = Lockout(True, 3, 3, 1000)


def answer(values: dict[int, int], *, code: int = 0, capability: int = 6, count: int | None = None) -> bytes:
    body = struct.pack(">BII", 0, capability, len(values) if count is None else count)
    body += b"".join(struct.pack(">II", *pair) for pair in values.items())
    return struct.pack(">HII", 0x8001, 10 + len(body), code) + body


def properties(lockout: Lockout, permanent: int = 0) -> dict[int, int]:
    """All 17 that are asked for, as libtpms gives them."""
    values = dict.fromkeys(range(0x200, 0x211), 7)
    values[0x200] = permanent & ~IN_LOCKOUT | (IN_LOCKOUT if lockout.locked else 0)
    values |= {0x20E: lockout.failed_tries, 0x20F: lockout.max_tries, 0x210: lockout.interval_s}
    return values


U32 = st.integers(0, 2**32 - 1)
LOCKOUTS = st.builds(Lockout, st.booleans(), U32, U32, U32)


def test_question_is_the_one_of_the_specification() -> None:
    # TPM2_GetCapability, TPM_CAP_TPM_PROPERTIES, from TPM_PT_PERMANENT, 17 of them.
    assert bytes.fromhex("8001 00000016 0000017a 00000006 00000200 00000011") == GET_LOCKOUT


@effort.codec
@given(LOCKOUTS, U32)
def test_lockout_is_read_whatever_else_is_set(lockout: Lockout, permanent: int) -> None:
    assert parse_lockout(answer(properties(lockout, permanent))) == lockout


@pytest.mark.parametrize("missing", [0x200, 0x20E, 0x20F, 0x210])
def test_answer_is_refused_when_a_property_is_missing(missing: int) -> None:
    values = properties(LOCKED)
    del values[missing]
    with pytest.raises(ProtocolError, match=f"lacks property 0x{missing:x}"):
        parse_lockout(answer(values))


def test_answer_is_refused_when_the_tpm_refuses() -> None:
    refused = bytes.fromhex("8001 0000000a 00000100")
    with pytest.raises(ProtocolError, match="TPM_RC_INITIALIZE"):
        parse_lockout(refused)


GOOD = answer(properties(LOCKED))
BAD = {
    "another tag": b"\x80\x02" + GOOD[2:],
    "no body": bytes.fromhex("8001 0000000a 00000000"),
    "another capability": answer(properties(LOCKED), capability=5),
    "more announced than there is": answer(properties(LOCKED), count=16),
    "less announced than there is": answer({0x200: 0}, count=17),
    "more than was asked for": answer(properties(LOCKED) | {0x211: 0}),
    "count without end": answer({}, count=2**32 - 1),
    "half a property": GOOD[:2] + struct.pack(">I", len(GOOD) + 4) + GOOD[6:] + bytes(4),
}


@pytest.mark.parametrize("response", BAD.values(), ids=BAD)
def test_answer_is_refused_when_it_is_another(response: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_lockout(response)


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_answer_is_refused_when_cut(length: int) -> None:
    with pytest.raises(ProtocolError):
        parse_lockout(GOOD[:length])


@effort.codec
@given(spoiled(LOCKOUTS.map(lambda lockout: answer(properties(lockout)))))
def test_spoiled_answer_is_refused_or_read(response: bytes) -> None:
    try:
        lockout = parse_lockout(response)
    except ProtocolError:
        return
    assert all(0 <= value < 2**32 for value in (lockout.failed_tries, lockout.max_tries, lockout.interval_s))


@effort.codec
@given(st.binary(max_size=300))
def test_noise_is_refused_or_read(noise: bytes) -> None:
    try:
        assert isinstance(parse_lockout(noise), Lockout)
    except ProtocolError:
        return
