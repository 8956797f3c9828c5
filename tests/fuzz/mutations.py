"""Strategies that spoil valid messages and cut valid streams."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import strategies as st

_BOUNDARIES = st.sampled_from([0, 1, 0x7F, 0x80, 0xC0, 0xDB, 0xFF])


@st.composite
def spoiled(draw: st.DrawFn, valid: st.SearchStrategy[bytes]) -> bytes:
    """A valid message after one to four accidents: bytes changed, cut out, put in, doubled, cut off, added."""
    data = bytearray(draw(valid))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        until = min(len(data), at + draw(st.integers(1, 8)))
        match draw(st.integers(0, 5)):
            case 0 if at < len(data):
                data[at] = draw(st.one_of(_BOUNDARIES, st.integers(0, 255)))
            case 1:
                del data[at:until]
            case 2:
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case 3:
                data[at:at] = data[at:until]
            case 4:
                del data[at:]
            case _:
                # A number field at its limits.
                data[at:until] = draw(_BOUNDARIES).to_bytes(1, "big") * (until - at)
    return bytes(data)


@st.composite
def cuts(draw: st.DrawFn, stream: bytes) -> Sequence[bytes]:
    """The stream in pieces, some of them empty."""
    places = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    bounds = [0, *places, len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(bounds)]
