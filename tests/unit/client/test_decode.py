"""The decoder gives back what was written, and refuses what lacks a field or has one of another type."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.client.canned_manager import IN_USE, STATUS, STOPPED, event, to_json
from vtpm.client.decode import decode
from vtpm.errors import ProtocolError
from vtpm.wire.api import ApiError, AuditEvent, ShutDown, Status, Vtpm

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


def as_json(value: object) -> Any:
    return json.loads(to_json(value))


def paths(value: Any) -> list[list[str | int]]:
    """Return the way to every member and item of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [[key, *rest] for key, inner in items for rest in ([], *paths(inner))]


@given(st.builds(Vtpm))
def test_a_vtpm_is_read_as_written_when_it_is_any(vtpm: Vtpm) -> None:
    # Halves of surrogate pairs too: JSON's escapes carry them.
    assert decode(Vtpm, as_json(vtpm), "it") == vtpm


@given(st.builds(Status))
def test_a_status_is_read_as_written_when_it_is_any(status: Status) -> None:
    assert decode(Status, as_json(status), "it") == status


@given(st.builds(AuditEvent, detail=st.dictionaries(texts, json_values, max_size=4)))
def test_an_event_is_read_as_written_when_its_detail_is_any_json(one: AuditEvent) -> None:
    assert decode(AuditEvent, as_json(one), "it") == one


@given(
    st.sampled_from([Vtpm, Status, AuditEvent, ShutDown, ApiError, list[Vtpm]]),
    json_values,
)
def test_nothing_but_a_protocol_error_comes_when_the_value_is_any_json(kind: type, value: Any) -> None:
    try:
        decode(kind, value, "it")
    except ProtocolError as error:
        assert error.message.startswith("it")


@pytest.mark.parametrize(("kind", "sample"), [(Vtpm, IN_USE), (Status, STATUS), (AuditEvent, event(1))])
def test_it_is_refused_when_any_field_is_missing(kind: type, sample: object) -> None:
    fields = [path for path in paths(as_json(sample)) if isinstance(path[-1], str) and path[:-1] != ["detail"]]
    assert len(fields) >= 6
    for *way, last in fields:
        value = inner = as_json(sample)
        for step in way:
            inner = inner[step]
        del inner[last]
        with pytest.raises(ProtocolError, match=f"lacks the field '{last}'"):
            decode(kind, value, "it")


def test_a_field_that_is_not_known_is_passed_over_when_a_newer_manager_answers() -> None:
    value = as_json(IN_USE) | {"colour": "green"}
    value["owner"]["name"] = "root"
    assert decode(Vtpm, value, "it") == IN_USE


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epoch", True, "it.epoch is of type bool, not int"),
        ("epoch", 1.0, "it.epoch is of type float, not int"),
        ("name", None, "it.name is of type NoneType, not str"),
        ("uuid", "x", "it.uuid is 'x', which is no UUID"),
        ("state", "asleep", "it.state is 'asleep', which is no LifeState"),
        ("owner", [], "it.owner is of type list, not dict"),
        ("client", {"kind": "data", "pid": "1", "uid": 0}, "it.client.pid is of type str, not int"),
    ],
)
def test_it_is_refused_by_name_when_a_field_is_of_another_type(field: str, value: object, message: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(Vtpm, as_json(STOPPED) | {field: value}, "it")
    assert caught.value.message == message


def test_it_is_a_programming_error_when_an_annotation_is_not_known() -> None:
    with pytest.raises(TypeError):
        decode(bytes, "x", "it")
