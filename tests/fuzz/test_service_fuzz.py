"""The services' messages: what is taken has one meaning and one form, and nothing but ProtocolError is raised."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import spoiled
from tests.unit.wire_service.messages import SERVICE, Everything, Inner, Nothing, Text
from vtpm.errors import ConflictError, ProtocolError, VtpmError
from vtpm.tpm.types import TpmVersion
from vtpm.wire import service
from vtpm.wire.keeper import KEEPER
from vtpm.wire.launcher import LAUNCHER
from vtpm.wire.service import MAX_DEPTH, MAX_PACKET_BYTES, Interface, RequestError

INTERFACES = (SERVICE, KEEPER, LAUNCHER)
MAX_ID = 2**63 - 1

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
_inner = st.builds(Inner, st.integers(-100, 100), st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
everything = st.builds(
    Everything,
    flag=st.booleans(),
    number=st.integers(0, MAX_ID),
    text=_text,
    data=st.binary(max_size=64),
    uuid=st.uuids(),
    vtpm_id=st.uuids(),
    version=st.sampled_from(TpmVersion),
    inner=_inner,
    inners=st.lists(_inner, max_size=3).map(tuple),
    maybe=st.none() | _inner,
    maybe_text=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)
operations = st.one_of(
    st.tuples(st.just("everything"), everything),
    st.tuples(st.just("say"), st.builds(Text, _text)),
    st.tuples(st.just("end"), st.just(Nothing())),
)
_ids = st.integers(0, MAX_ID)
requests = st.builds(lambda number, one: service.encode_request(SERVICE, number, *one), _ids, operations)
errors = st.builds(lambda text, step: ConflictError(text, next_step=step), _text, _text)
from_service = st.one_of(
    st.builds(lambda number, one: service.encode_result(SERVICE, number, *one), _ids, operations),
    st.builds(service.encode_error, st.none() | _ids, errors),
    st.builds(lambda text: service.encode_event(SERVICE, "said", Text(text)), _text),
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8).map(bytes.hex),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
# Numbers at the limits, other forms of what the codec takes in one form alone, and what JSON has beside that.
tokens = st.sampled_from(
    ["-1", "0", "-0", "1e3", "1.0", "NaN", "Infinity", str(2**63), "9" * 21, "null", '"\\ud800"', '"QQ="', '"QQ=="',
     '"QR=="', '"{6AD77C2A-96B5-4B26-8C8D-2F9BA4E8A4FE}"', '"6AD77C2A-96B5-4B26-8C8D-2F9BA4E8A4FE"', "[", "{}", "]"]
)  # fmt: skip


@effort.codec
@given(_ids, operations)
def test_request_and_result_come_back_when_valid(number: int, operation: tuple[str, Any]) -> None:
    name, value = operation
    request = service.decode_request(SERVICE, service.encode_request(SERVICE, number, name, value))
    assert (request.id, request.op, request.args) == (number, name, value)
    reply = service.decode_from_service(SERVICE, service.encode_result(SERVICE, number, name, value))
    assert isinstance(reply, service.Reply)
    assert (reply.id, reply.error) == (number, None)
    assert service.decode_result(SERVICE, name, reply.ok) == value


def _take(packet: bytes) -> None:
    """Read a packet as either side: what is taken is written again in a form that means the same."""
    for interface in INTERFACES:
        try:
            request = service.decode_request(interface, packet)
        except RequestError as error:
            assert error.request_id is None or 0 <= error.request_id <= MAX_ID
        else:
            again = service.encode_request(interface, request.id, request.op, request.args)
            assert json.loads(again) == json.loads(packet)
        try:
            message = service.decode_from_service(interface, packet)
        except ProtocolError:
            continue
        if isinstance(message, service.Event):
            again = service.encode_event(interface, message.event, message.args)
            assert json.loads(again) == json.loads(packet)
        elif message.error is None:
            for name in interface.operations:
                _take_result(interface, name, message)
        else:
            assert isinstance(message.error, VtpmError)


def _take_result(interface: Interface, name: str, reply: service.Reply) -> None:
    try:
        result = service.decode_result(interface, name, reply.ok)
    except ProtocolError:
        return
    again = json.loads(service.encode_result(interface, reply.id, name, result))
    assert again == {"id": reply.id, "ok": reply.ok}


@effort.codec
@given(spoiled(st.one_of(requests, from_service)))
def test_spoiled_packet_is_refused_or_is_another_valid_one(packet: bytes) -> None:
    _take(packet)


@effort.codec
@given(st.one_of(requests, from_service), st.data())
def test_packet_is_refused_or_valid_when_a_part_of_it_is_replaced(packet: bytes, data: st.DataObject) -> None:
    whole = json.loads(packet)
    holder, key = data.draw(st.sampled_from(list(_places(whole))))
    match data.draw(st.integers(0, 2)):
        case 0:
            holder[key] = data.draw(json_values)
        case 1:
            del holder[key]
        case _ if isinstance(holder, dict):
            holder[data.draw(st.text(max_size=5))] = None
    _take(json.dumps(whole).encode())


@effort.codec
@given(st.one_of(requests, from_service), tokens, st.data())
def test_packet_is_refused_or_valid_when_a_value_has_another_form(
    packet: bytes, token: str, data: st.DataObject
) -> None:
    whole = json.loads(packet)
    holder, key = data.draw(st.sampled_from(list(_places(whole))))
    holder[key] = "\0here"
    _take(json.dumps(whole).replace('"\\u0000here"', token).encode())


@effort.codec
@given(requests, st.data())
def test_packet_is_refused_when_a_member_comes_twice(packet: bytes, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(json.loads(packet))))
    with pytest.raises(RequestError, match="twice"):
        service.decode_request(SERVICE, packet.replace(b"{", b'{"' + name.encode() + b'":0,', 1))


@effort.codec
@given(_ids, st.sampled_from([VtpmError, *VtpmError.__subclasses__()]), st.text(max_size=30), _text)
def test_error_comes_back_with_its_class_when_sent(
    number: int, kind: type[VtpmError], message: str, next_step: str
) -> None:
    packet = service.encode_error(number, kind(message, next_step=next_step))
    reply = service.decode_from_service(SERVICE, packet)
    assert isinstance(reply, service.Reply)
    assert isinstance(reply.error, kind)
    assert reply.error.next_step == next_step


def _places(value: Any) -> Any:
    """Yield each member or item as what holds it and its key."""
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield value, key
        yield from _places(inner)


@effort.codec
@given(st.one_of(st.binary(max_size=200), st.text(st.sampled_from('[]{}",:\\0ai d'), max_size=60).map(str.encode)))
def test_noise_is_refused(noise: bytes) -> None:
    _take(noise)


@effort.codec
@given(st.integers(1, 4 * MAX_DEPTH), st.sampled_from(["[", '{"a":']), st.booleans())
def test_depth_is_bounded_when_a_packet_nests(depth: int, opening: str, closed: bool) -> None:
    closing = "]" if opening == "[" else "}"
    _take(('{"id":1,"op":"end","args":' + opening * depth + "0" + closing * depth * closed + "}").encode())


_wrong = st.one_of(
    *(st.none(), st.booleans(), st.integers(-(2**70), 2**70), _text, st.binary(max_size=70), st.just([])),
    *(st.lists(_inner, min_size=4, max_size=5).map(tuple), st.just(Inner(101, "x"))),
)


@effort.codec
@given(everything, st.sampled_from(TpmVersion), _wrong)
def test_nothing_is_written_that_cannot_be_read_when_a_field_is_of_another_kind(
    value: Everything, version: TpmVersion, wrong: Any
) -> None:
    for name in Everything.__dataclass_fields__:
        changed = replace(value, **{"version": version, name: wrong})
        try:
            packet = service.encode_request(SERVICE, 1, "everything", changed)
        except ProtocolError:
            continue
        assert service.decode_request(SERVICE, packet).args == changed


@effort.codec
@given(everything, json_values)
def test_request_is_refused_or_valid_when_any_of_its_fields_is_replaced(value: Everything, other: Any) -> None:
    packet = json.loads(service.encode_request(SERVICE, 1, "everything", value))
    for name in packet["args"]:
        _take(json.dumps(packet | {"args": packet["args"] | {name: other}}).encode())
    _take(json.dumps(other).encode())


_OVERSIZED: list[Callable[[], object]] = [
    lambda: service.encode_request(SERVICE, 1, "say", Text("\u00e9" * 59_000)),
    lambda: service.encode_request(SERVICE, 1, "none", Nothing()),
    lambda: service.encode_event(SERVICE, "none", Nothing()),
    lambda: service.decode_from_service(SERVICE, b" " * (MAX_PACKET_BYTES + 1)),
]


@pytest.mark.parametrize("call", _OVERSIZED)
def test_unknown_and_oversized_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ProtocolError):
        call()
