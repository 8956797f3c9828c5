"""The back-end's agreement with a front-end: bounded keys, the order of states, restarts, the toolstack's detaching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

import pytest

from vtpm.errors import ProtocolError
from vtpm.wire.xenbus import (
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
    XenbusState,
    parse_number,
    parse_state,
    parse_uuid,
    read_offer,
)

ID = UUID("0f1c2f0e-6b3c-4f6e-9d1e-2a7f6f3b9c11")
DEVICE = DeviceId(7, 0)
FRESH = Keys(str(ID).encode(), b"7", b"1", b"1", None, None, None)
OFFERED = replace(FRESH, state=b"3", ring_ref=b"8", event_channel=b"12", protocol_v2=b"1")
OFFER = Connect(8, 12)

INIT_WAIT = Write({"state": b"2"})
FIRST = Write({"feature-protocol-v2": b"1", "state": b"2"})
CONNECTED = Write({"ready": b"1", "state": b"4"})
CLOSING = Write({"state": b"5"})
CLOSED = Write({"state": b"6"})


def state(value: int | None, keys: Keys = OFFERED) -> Keys:
    return replace(keys, state=None if value is None else str(value).encode())


def offline(keys: Keys) -> Keys:
    return replace(keys, online=b"0")


def at(phase: Phase) -> Handshake:
    """A device of which the front-end has behaved well so far."""
    one = Handshake(DEVICE, ID)
    if phase is Phase.NEW:
        return one
    one.step(FRESH)
    match phase:
        case Phase.CONNECTED:
            one.step(OFFERED)
            one.connected()
            one.step(state(4))
        case Phase.CLOSING:
            one.step(state(5))
        case Phase.REFUSED:
            one.step(OFFERED)
            one.refused("no such grant")
        case Phase.OFFLINE:
            one.step(offline(FRESH))
        case Phase.GONE:
            one.step(replace(FRESH, uuid=None))
        case _:
            pass
    assert one.phase is phase
    return one


# -- keys -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "device"),
    [
        ("backend/vtpm/7/0", DEVICE),
        ("backend/vtpm/7/0/state", DEVICE),
        ("backend/vtpm/7/0/a/b", DEVICE),
        ("backend/vtpm/32751/2147483647", DeviceId(32751, 2147483647)),
        ("backend/vtpm/32752/0", None),
        ("backend/vtpm/7/2147483648", None),
        ("backend/vtpm/07/0", None),
        ("backend/vtpm/-7/0", None),
        ("backend/vtpm/7/0x", None),
        ("backend/vtpm/7", None),
        ("backend/vtpm", None),
        ("backend/vbd/7/0", None),
        ("/local/domain/0/backend/vtpm/7/0", None),
        ("backend/vtpm/99999999999999999999/0", None),
        ("backend/vtpm/٧/0", None),
    ],
)
def test_device_is_found_in_a_path_when_it_names_one(path: str, device: DeviceId | None) -> None:
    assert DeviceId.of_path(path) == device


def test_paths_are_of_the_device_when_asked() -> None:
    assert DEVICE.backend_path == "backend/vtpm/7/0"
    assert DEVICE.frontend_path == "/local/domain/7/device/vtpm/0"


@pytest.mark.parametrize(
    "value", [b"", b"-1", b"+1", b" 1", b"1 ", b"01", b"0x1", b"1\0", b"1\n", b"9" * 4096, b"\xff"]
)
def test_number_is_refused_when_it_is_not_of_the_usual_form(value: bytes) -> None:
    with pytest.raises(ProtocolError, match="ring-ref is no number") as error:
        parse_number(value, "ring-ref", 0, 2**40)
    assert len(error.value.message) < 200


def test_number_is_read_when_it_is_within_its_bounds() -> None:
    assert [parse_number(value, "n", 1, 10) for value in (b"1", b"10")] == [1, 10]
    for value in (b"0", b"11", b"4294967296"):
        with pytest.raises(ProtocolError, match="1 to 10 are allowed"):
            parse_number(value, "n", 1, 10)
    with pytest.raises(ProtocolError, match="n is missing"):
        parse_number(None, "n", 1, 10)


def test_state_is_unknown_when_it_is_none() -> None:
    assert [parse_state(str(number).encode()) for number in range(9)] == list(XenbusState)
    assert parse_state(b"9") is parse_state(b"four") is parse_state(b"") is XenbusState.UNKNOWN
    assert parse_state(None) is None


def test_uuid_is_read_when_it_is_in_its_usual_form() -> None:
    assert parse_uuid(str(ID).encode()) == parse_uuid(str(ID).upper().encode()) == ID
    for value in (None, b"", ID.hex.encode(), b"{" + str(ID).encode() + b"}", str(ID).encode() + b"\n", b"\xff" * 36):
        assert parse_uuid(value) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"protocol_v2": None}, "feature-protocol-v2 is not 1"),
        ({"protocol_v2": b"0"}, "feature-protocol-v2 is not 1"),
        ({"ring_ref": None}, "ring-ref is missing"),
        ({"ring_ref": b"7"}, "ring-ref is 7; 8 to 4294967295"),
        ({"ring_ref": b"4294967296"}, "ring-ref is 4294967296"),
        ({"event_channel": None}, "event-channel is missing"),
        ({"event_channel": b"0"}, "event-channel is 0; 1 to 131071"),
        ({"event_channel": b"131072"}, "event-channel is 131072"),
        ({"event_channel": b"12,"}, "event-channel is no number"),
    ],
)
def test_offer_is_refused_by_name_when_a_key_is_malformed(change: dict[str, bytes | None], named: str) -> None:
    keys = replace(OFFERED, **change)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match=named):
        read_offer(keys)
    one = at(Phase.WAITING)
    refusal, *rest = one.step(keys)
    assert isinstance(refusal, Refuse) and named in refusal.reason
    assert rest == [Disconnect(), CLOSED]
    assert one.phase is Phase.REFUSED


def test_offer_is_read_when_its_numbers_are_as_large_as_may_be() -> None:
    keys = replace(OFFERED, ring_ref=b"4294967295", event_channel=b"131071")
    assert read_offer(keys) == Connect(2**32 - 1, 2**17 - 1)


# -- what follows ---------------------------------------------------------------------------------------------------
def test_device_is_connected_and_closed_in_the_order_of_the_protocol_when_linux_is_the_front_end() -> None:
    one = Handshake(DEVICE, ID)
    assert one.step(FRESH) == [FIRST]
    assert one.step(FRESH) == []
    assert one.step(OFFERED) == [OFFER]
    assert one.connected() == (CONNECTED,)
    assert one.step(OFFERED) == []
    assert one.step(state(4)) == []
    assert one.step(state(4)) == []
    assert one.step(state(5)) == [CLOSING]
    assert one.step(state(5)) == []
    assert one.step(state(6)) == [Disconnect(), INIT_WAIT]
    assert one.step(state(6)) == []
    assert one.step(state(1)) == []
    assert one.step(replace(OFFERED, ring_ref=b"9")) == [Connect(9, 12)]


def test_front_end_is_connected_when_it_goes_to_connected_at_once_as_mini_os_does() -> None:
    one = at(Phase.WAITING)
    assert one.step(state(4)) == [OFFER]
    one.connected()
    assert one.step(state(4)) == []


@pytest.mark.parametrize("value", [3, 4])
def test_front_end_is_connected_anew_when_the_back_end_before_this_one_died(value: int) -> None:
    assert Handshake(DEVICE, ID).step(state(value)) == [FIRST, OFFER]


@pytest.mark.parametrize(
    ("phase", "value", "actions", "then"),
    [
        (Phase.WAITING, None, [], Phase.WAITING),
        (Phase.WAITING, 0, [], Phase.WAITING),
        (Phase.WAITING, 2, [], Phase.WAITING),
        (Phase.WAITING, 5, [CLOSING], Phase.CLOSING),
        (Phase.WAITING, 6, [], Phase.WAITING),
        (Phase.WAITING, 7, [], Phase.WAITING),
        (Phase.CONNECTED, 0, [], Phase.CONNECTED),
        (Phase.CONNECTED, 1, [Disconnect(), INIT_WAIT], Phase.WAITING),
        (Phase.CONNECTED, 2, [], Phase.CONNECTED),
        (Phase.CONNECTED, 3, [Disconnect(), INIT_WAIT, OFFER], Phase.WAITING),
        (Phase.CONNECTED, 4, [], Phase.CONNECTED),
        (Phase.CONNECTED, 5, [CLOSING], Phase.CLOSING),
        (Phase.CONNECTED, 6, [Disconnect(), INIT_WAIT], Phase.WAITING),
        (Phase.CONNECTED, 8, [], Phase.CONNECTED),
        (Phase.CLOSING, 1, [Disconnect(), INIT_WAIT], Phase.WAITING),
        (Phase.CLOSING, 3, [Disconnect(), INIT_WAIT, OFFER], Phase.WAITING),
        (Phase.CLOSING, 4, [], Phase.CLOSING),
        (Phase.CLOSING, 6, [Disconnect(), INIT_WAIT], Phase.WAITING),
        (Phase.REFUSED, None, [], Phase.REFUSED),
        (Phase.REFUSED, 1, [Disconnect(), INIT_WAIT], Phase.WAITING),
        (Phase.REFUSED, 3, [], Phase.REFUSED),
        (Phase.REFUSED, 4, [], Phase.REFUSED),
        (Phase.REFUSED, 5, [], Phase.REFUSED),
        (Phase.REFUSED, 6, [Disconnect(), INIT_WAIT], Phase.WAITING),
    ],
)
def test_what_follows_is_as_written_down_when_the_front_end_changes_its_state(
    phase: Phase, value: int | None, actions: Sequence[Action], then: Phase
) -> None:
    one = at(phase)
    assert one.step(state(value)) == actions
    assert one.phase is then


@pytest.mark.parametrize("phase", [Phase.CONNECTED, Phase.CLOSING])
def test_all_is_let_go_when_the_front_ends_directory_is_gone(phase: Phase) -> None:
    one = at(phase)
    refusal, *rest = one.step(state(None))
    assert isinstance(refusal, Refuse)
    assert rest == [Disconnect(), CLOSED]
    assert one.phase is Phase.REFUSED


@pytest.mark.parametrize("value", [3, 4])
def test_front_end_is_connected_anew_when_it_offers_another_page(value: int) -> None:
    other = replace(state(value), ring_ref=b"99")
    assert at(Phase.CONNECTED).step(other) == [Disconnect(), INIT_WAIT, Connect(99, 12)]


def test_front_end_is_closed_when_its_keys_turn_malformed_while_it_is_connected() -> None:
    one = at(Phase.CONNECTED)
    refusal, *rest = one.step(replace(state(4), event_channel=b"x"))
    assert isinstance(refusal, Refuse)
    assert rest == [Disconnect(), CLOSED]


def test_nothing_is_connected_anew_when_the_state_is_told_twice_before_the_front_end_follows() -> None:
    one = at(Phase.WAITING)
    one.step(OFFERED)
    one.connected()
    assert [one.step(OFFERED), one.step(OFFERED)] == [[], []]


def test_front_end_is_told_closed_when_its_grant_cannot_be_mapped() -> None:
    one = at(Phase.WAITING)
    one.step(OFFERED)
    assert one.refused("no such grant") == (Refuse("no such grant"), Disconnect(), CLOSED)
    assert one.step(OFFERED) == []
    assert one.step(state(6)) == [Disconnect(), INIT_WAIT]
    assert one.step(OFFERED) == [OFFER]


# -- the toolstack --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [3, 4])
def test_front_end_is_closed_first_when_the_toolstack_detaches_a_device_in_use(value: int) -> None:
    one = at(Phase.CONNECTED)
    assert one.step(offline(state(value))) == [CLOSING]
    assert one.step(offline(state(value))) == []
    assert one.step(offline(state(5))) == []
    assert one.step(offline(state(6))) == [Disconnect(), CLOSED, Retire()]
    assert one.phase is Phase.OFFLINE


@pytest.mark.parametrize("phase", [Phase.NEW, Phase.WAITING, Phase.REFUSED, Phase.CONNECTED, Phase.CLOSING])
@pytest.mark.parametrize("online", [b"0", b"", b"yes", None])
def test_device_is_closed_and_retired_when_it_is_not_online_and_its_front_end_is_gone(
    phase: Phase, online: bytes | None
) -> None:
    one = at(phase)
    actions = list(one.step(replace(state(None), online=online)))
    assert actions[-3:] == [Disconnect(), CLOSED, Retire()]
    assert one.phase is Phase.OFFLINE


@pytest.mark.parametrize("keys", [FRESH, OFFERED, offline(OFFERED), state(1), state(6)])
def test_nothing_follows_when_a_device_was_detached(keys: Keys) -> None:
    one = at(Phase.OFFLINE)
    assert list(one.step(keys)) == []


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.GONE])
@pytest.mark.parametrize(
    "change",
    [
        {"uuid": None},
        {"uuid": b"00000000-0000-0000-0000-000000000001"},
        {"uuid": b"junk"},
        {"frontend_id": b"8"},
        {"frontend_id": None},
        {"frontend_id": b"07"},
    ],
)
def test_all_is_let_go_and_nothing_written_when_the_directory_is_gone_or_anothers(
    phase: Phase, change: dict[str, bytes | None]
) -> None:
    one = at(phase)
    assert one.step(replace(OFFERED, **change)) == (Disconnect(),)  # type: ignore[arg-type]
    assert one.phase is Phase.GONE
    assert one.step(OFFERED) == ()
