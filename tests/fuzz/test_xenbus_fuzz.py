"""Keys that hold anything, in any order: what is connected is bounded and single, and the dead are not written to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from vtpm.wire.xenbus import (
    FIRST_GRANT,
    MAX_DOMAIN_ID,
    MAX_GRANT,
    MAX_HANDLE,
    MAX_PORT,
    Action,
    Connect,
    DeviceId,
    Disconnect,
    Handshake,
    Keys,
    Phase,
    Refuse,
    Retire,
    Write,
)

ID = UUID("0f1c2f0e-6b3c-4f6e-9d1e-2a7f6f3b9c11")
DEVICE = DeviceId(7, 0)
SANE = Keys(str(ID).encode(), b"7", b"1", b"3", b"8", b"12", b"1")

_junk = st.one_of(st.none(), st.binary(max_size=12), st.just(b"9" * 4096))
_numbers = st.sampled_from([0, 1, 7, 8, 9, MAX_PORT, MAX_PORT + 1, MAX_GRANT, MAX_GRANT + 1]).map(
    lambda number: str(number).encode()
)
_states = st.integers(0, 9).map(lambda number: str(number).encode())


@st.composite
def mostly(
    draw: st.DrawFn, sane: st.SearchStrategy[bytes | None], other: st.SearchStrategy[bytes | None] = _junk
) -> bytes | None:
    """Sane nineteen times in twenty, so that more than a few steps are made before the end."""
    return draw(other if draw(st.integers(0, 19)) == 13 else sane)


keys = st.builds(
    Keys,
    mostly(st.just(SANE.uuid)),
    mostly(st.just(SANE.frontend_id)),
    mostly(st.just(b"1"), st.one_of(st.just(b"0"), _junk)),
    mostly(_states),
    mostly(st.just(SANE.ring_ref), st.one_of(_numbers, _junk)),
    mostly(st.just(SANE.event_channel), st.one_of(_numbers, _junk)),
    mostly(st.just(b"1")),
)
mostly_works = st.sampled_from([True, True, True, False])


class Holder:
    """Carries actions out, and counts what is held."""

    def __init__(self) -> None:
        self.held = False
        self.shown: list[bytes] = []

    def carry_out(self, handshake: Handshake, actions: Sequence[Action], works: bool) -> None:
        for at, action in enumerate(actions):
            match action:
                case Connect(ring_ref, event_channel):
                    assert not self.held and at == len(actions) - 1
                    assert FIRST_GRANT <= ring_ref <= MAX_GRANT and 1 <= event_channel <= MAX_PORT
                    self.held = works
                    self.carry_out(handshake, handshake.connected() if works else handshake.refused("no"), works)
                case Disconnect():
                    self.held = False
                case Write(written):
                    assert set(written) <= {"state", "feature-protocol-v2", "ready"}
                    assert list(written)[-1] == "state" and written["state"] in (b"2", b"4", b"5", b"6")
                    self.shown.append(written["state"])
                case Refuse(reason):
                    assert 0 < len(reason) < 300
                case Retire():
                    assert not self.held


@effort.codec
@given(st.lists(st.tuples(st.one_of(keys, st.just(SANE)), mostly_works), min_size=4, max_size=16))
def test_one_page_at_most_is_held_and_none_of_the_dead_when_keys_hold_anything(told: list[tuple[Keys, bool]]) -> None:
    handshake, holder = Handshake(DEVICE, ID), Holder()
    for seen, works in told:
        was = handshake.phase
        shown = len(holder.shown)
        holder.carry_out(handshake, handshake.step(seen), works)
        if holder.held:
            assert handshake.phase in (Phase.CONNECTED, Phase.CLOSING)
            assert seen.state not in (None, b"1", b"6")
        if Phase.GONE in (was, handshake.phase):
            assert not holder.held and handshake.phase is Phase.GONE
            assert len(holder.shown) == shown
        # Told the same again, it does nothing more.
        assert list(handshake.step(seen)) == []
    handshake.step(replace(SANE, uuid=None))
    assert handshake.phase is Phase.GONE


_parts = st.one_of(st.integers(0, 2**33).map(str), st.sampled_from(["07", "-1", "", "x", "٧"]))


@effort.codec
@given(_parts, _parts, st.sampled_from(["", "/", "/state", "x"]))
def test_device_of_a_path_is_bounded_and_named_by_it_when_it_is_one(domain: str, handle: str, rest: str) -> None:
    path = f"backend/vtpm/{domain}/{handle}{rest}"
    device = DeviceId.of_path(path)
    if device is not None:
        assert 0 <= device.domain <= MAX_DOMAIN_ID and 0 <= device.handle <= MAX_HANDLE
        assert path == device.backend_path + rest
