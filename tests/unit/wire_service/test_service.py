"""The codec of service messages accepts exactly what it writes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.wire_service.messages import SERVICE, Everything, Inner, Text
from vtpm.errors import ConflictError, ProtocolError, VtpmError
from vtpm.tpm.types import TpmVersion, VtpmId
from vtpm.wire import service
from vtpm.wire.keeper import Key, NewKey
from vtpm.wire.service import MAX_PACKET_BYTES, Operation

U = UUID("6ad77c2a-96b5-4b26-8c8d-2f9ba4e8a4fe")
SAMPLE = Everything(
    flag=True,
    number=7,
    text="a\u00e9\u4e2d\U0001f511\x00",
    data=b"\x00\xff",
    uuid=U,
    vtpm_id=VtpmId(U),
    version=TpmVersion.V2_0,
    inner=Inner(-100, "x"),
    inners=(Inner(1, ""), Inner(2, "")),
    maybe=None,
    maybe_text="abcd",
)
# The half of a surrogate pair is what Hypothesis leaves out of text() when told so.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
inners = st.builds(Inner, st.integers(-100, 100), st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
everythings = st.builds(
    Everything,
    flag=st.booleans(),
    number=st.integers(0, 2**63 - 1),
    text=texts,
    data=st.binary(max_size=64),
    uuid=st.uuids(),
    vtpm_id=st.uuids(),
    version=st.sampled_from(TpmVersion),
    inner=inners,
    inners=st.lists(inners, max_size=3).map(tuple),
    maybe=st.none() | inners,
    maybe_text=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def members() -> dict[str, Any]:
    """Return the JSON of a good request."""
    whole: dict[str, Any] = json.loads(service.encode_request(SERVICE, 5, "everything", SAMPLE))
    return whole


def refused(packet: bytes | dict[str, Any]) -> service.RequestError:
    data = packet if isinstance(packet, bytes) else json.dumps(packet).encode()
    with pytest.raises(service.RequestError) as caught:
        service.decode_request(SERVICE, data)
    return caught.value


@given(everythings, st.integers(0, 2**63 - 1))
def test_round_trip_when_valid(value: Everything, request_id: int) -> None:
    request = service.decode_request(SERVICE, service.encode_request(SERVICE, request_id, "everything", value))
    assert (request.id, request.op, request.args) == (request_id, "everything", value)
    reply = service.decode_from_service(SERVICE, service.encode_result(SERVICE, request_id, "everything", value))
    assert isinstance(reply, service.Reply)
    assert service.decode_result(SERVICE, "everything", reply.ok) == value
    event = service.decode_from_service(SERVICE, service.encode_event(SERVICE, "said", Text(value.text)))
    assert event == service.Event("said", Text(value.text))


@given(st.binary(max_size=200))
def test_only_protocol_errors_come_when_bytes_are_random(packet: bytes) -> None:
    for decode in (service.decode_request, service.decode_from_service):
        with pytest.raises(ProtocolError):
            decode(SERVICE, packet)


@given(st.data())
def test_what_is_accepted_encodes_to_the_same_when_a_part_is_replaced(data: st.DataObject) -> None:
    packet = members()
    target = data.draw(st.sampled_from([packet, packet["args"], packet["args"]["inner"], packet["args"]["inners"][0]]))
    name = data.draw(st.sampled_from(sorted(target)) | st.text(max_size=5))
    target[name] = data.draw(json_values)
    try:
        request = service.decode_request(SERVICE, json.dumps(packet).encode())
    except ProtocolError:
        return
    assert json.loads(service.encode_request(SERVICE, request.id, request.op, request.args)) == packet


@given(st.integers(0, 400), st.binary(min_size=1, max_size=3))
def test_only_protocol_errors_come_when_a_packet_is_damaged(place: int, damage: bytes) -> None:
    packet = service.encode_request(SERVICE, 5, "everything", SAMPLE)
    changed = packet[:place] + damage + packet[place + len(damage) :]
    try:
        request = service.decode_request(SERVICE, changed)
    except ProtocolError:
        return
    assert service.decode_request(SERVICE, service.encode_request(SERVICE, request.id, request.op, request.args))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flag", 1),
        ("flag", None),
        ("number", True),
        ("number", -1),
        ("number", 2**63),
        ("number", "1"),
        ("text", 5),
        ("text", "x" * 4097),
        ("text", "\ud800"),
        ("data", "AA"),
        ("data", "AB=="),
        ("data", "AA==\n"),
        ("data", "\u00e9"),
        ("data", "A" * 100),
        ("data", None),
        ("uuid", str(U).upper()),
        ("uuid", "{" + str(U) + "}"),
        ("uuid", U.hex),
        ("uuid", "x"),
        ("uuid", 5),
        ("version", "3"),
        ("version", []),
        ("inner", None),
        ("inner", []),
        ("inner", {"percent": 101, "label": ""}),
        ("inner", {"percent": 1, "label": "123456789"}),
        ("inners", {}),
        ("inners", [{"percent": 1, "label": ""}] * 4),
        ("maybe", 0),
        ("maybe_text", "12345"),
    ],
)
def test_request_is_refused_with_its_id_when_a_value_is_wrong(name: str, value: object) -> None:
    packet = members()
    packet["args"][name] = value
    error = refused(packet)
    assert error.request_id == 5
    assert name in error.message


def test_request_is_refused_when_a_field_is_missing_or_unknown() -> None:
    for name in members()["args"]:
        packet = members()
        del packet["args"][name]
        assert name in refused(packet).message
    packet = members()
    packet["args"]["surplus"] = 1
    assert "surplus" in refused(packet).message
    for name in ("op", "args"):
        packet = members()
        del packet[name]
        assert refused(packet).request_id == 5
    assert refused(members() | {"surplus": 1}).request_id == 5
    assert refused(members() | {"op": "format"}).request_id == 5


def test_no_id_is_known_when_the_envelope_is_unreadable() -> None:
    good = service.encode_request(SERVICE, 5, "everything", SAMPLE)
    for packet in (b"", b"[]", b"5", b"{", good[:-1], good + b" {}", b"\xef\xbb\xbf" + good, b"\xff", b"{}"):
        assert refused(packet).request_id is None
    assert refused(json.dumps(members()).encode("utf-16")).request_id is None
    for wrong in (True, -1, 2**63, "5", None, [5]):
        assert refused(members() | {"id": wrong}).request_id is None


def test_message_is_refused_when_it_is_ambiguous_or_no_json() -> None:
    assert "twice" in refused(b'{"id":5,"id":6,"op":"end","args":{}}').message
    assert "twice" in refused(b'{"id":5,"op":"end","args":{"a":1,"a":1}}').message
    for number in (b"NaN", b"Infinity", b"-Infinity", b"1e3", b"1.5"):
        assert "no integer" in refused(b'{"id":5,"op":"end","args":' + number + b"}").message
    assert "too large" in refused(b'{"id":' + b"1" * 5000 + b"}").message


def test_message_is_refused_at_once_when_it_is_deep_or_large() -> None:
    started_s = time.process_time()
    assert "nested" in refused(b"[" * 60_000).message
    assert "nested" in refused(b'{"a":' * 13 + b"1" + b"}" * 13).message
    assert "larger" in refused(b" " * (MAX_PACKET_BYTES + 1)).message
    # Quotes that never close must not be looked at once for each of them.
    assert refused(b'"' + b'\\"' * 32_000).request_id is None
    assert time.process_time() - started_s < 1.0
    brackets = service.encode_request(SERVICE, 1, "say", Text('[{"\\' * 1000))
    assert service.decode_request(SERVICE, brackets).args == Text('[{"\\' * 1000)


@pytest.mark.parametrize("value", [Inner(101, ""), Inner(True, ""), Inner(1, "\udcff"), Inner(1, b""), Text("a"), None])
def test_encoding_is_refused_when_a_value_is_not_as_declared(value: object) -> None:
    changed = Everything(**(vars(SAMPLE) | {"inner": value}))
    with pytest.raises(ProtocolError, match="inner"):
        service.encode_request(SERVICE, 1, "everything", changed)
    for name, wrong in {"data": "x", "inners": [], "version": "2.0", "uuid": str(U)}.items():
        with pytest.raises(ProtocolError, match=name):
            service.encode_request(SERVICE, 1, "everything", Everything(**(vars(SAMPLE) | {name: wrong})))


def test_encoding_is_refused_when_it_is_too_large_or_unknown() -> None:
    with pytest.raises(ProtocolError, match="larger"):
        service.encode_request(SERVICE, 1, "say", Text("\x00" * 20_000))
    with pytest.raises(ProtocolError, match="no operation"):
        service.encode_request(SERVICE, 1, "sing", Text(""))
    with pytest.raises(ProtocolError, match="no event"):
        service.encode_event(SERVICE, "sung", Text(""))
    with pytest.raises(ProtocolError):
        service.encode_result(SERVICE, 1, "say", SAMPLE)


def test_error_comes_back_as_its_class_when_its_code_is_known() -> None:
    def carried(error: VtpmError) -> VtpmError | None:
        reply = service.decode_from_service(SERVICE, service.encode_error(3, error))
        assert isinstance(reply, service.Reply)
        return reply.error

    error = carried(ConflictError("web1 runs", next_step="Stop it"))
    assert type(error) is ConflictError
    assert (error.message, error.next_step) == ("web1 runs", "Stop it")
    # A subclass without a code of its own comes back as the class that introduced the code.
    assert type(carried(service.RequestError("x", 1))) is ProtocolError
    odd = type("OddError", (VtpmError,), {"code": "unknown_elsewhere"})("x")
    packet = service.encode_error(3, odd).replace(b"unknown_elsewhere", b"never_heard_of")
    reply = service.decode_from_service(SERVICE, packet)
    assert isinstance(reply, service.Reply)
    assert type(reply.error) is VtpmError
    long = carried(VtpmError("\x00" * 100_000, next_step="\udcff"))
    assert long is not None
    assert (len(long.message), long.next_step) == (2000, "?")


def test_service_message_is_refused_when_it_is_malformed() -> None:
    for packet in (
        b"{}",
        b'{"id":1}',
        b'{"id":1,"ok":{},"error":{}}',
        b'{"id":1,"error":{"code":"x","message":"y"}}',
        b'{"id":true,"ok":{}}',
        b'{"event":"said"}',
        b'{"event":"sung","args":{}}',
        b'{"event":"said","args":{"text":1}}',
        b'{"event":["said"],"args":{}}',
    ):
        with pytest.raises(ProtocolError):
            service.decode_from_service(SERVICE, packet)
    with pytest.raises(ProtocolError):
        service.decode_result(SERVICE, "say", {"text": None})


def test_interface_cannot_be_declared_when_a_field_cannot_be_sent() -> None:
    for annotation in (float, object, dict, list[int], tuple[int, int], int | str | None, int | str, bytearray):
        record = dataclass(frozen=True)(type("Record", (), {"__annotations__": {"field": annotation}}))
        with pytest.raises(TypeError):
            Operation(record, Text)


def test_keys_are_hidden_and_measured_when_messages_hold_them() -> None:
    key = bytes(range(32))
    for shown in (repr(Key(key)), repr(NewKey(b"wrapped", key))):
        assert repr(key) not in shown
        assert key.hex() not in shown
        assert "\\x1f" not in shown
    with pytest.raises(ProtocolError):
        Key(key[:-1])
