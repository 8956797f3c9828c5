from __future__ import annotations

import dataclasses
from datetime import datetime

import pytest

from tests.unit.vault.world import CREATED, new_record
from vtpm.errors import UsageError
from vtpm.tpm.types import Make, TpmVersion
from vtpm.vault.records import DomainKind, Event, Permit, PermitState, valid_name
from vtpm.vault.rules import check_event, check_new_record
from vtpm.wire.api import DomainName
from vtpm.wire.api_images import ImageKind


@pytest.mark.parametrize("name", ["a", "0", "web1", "Web-1_b.c", "a" * 63])
def test_name_is_accepted_when_well_formed(name: str) -> None:
    assert valid_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a..b", "a.", "-a", "_a", ".a", "a" * 64, "a b", "a\n", "a\0", "ä", "١", "a;b"],
)
def test_name_is_refused_and_shown_when_malformed(name: str) -> None:
    with pytest.raises(UsageError) as refusal:
        valid_name(name)
    assert repr(name[:80]) in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../x"},
        {"lifecycle": ""},
        {"lifecycle": "x" * 65},
        {"wrapped_key": b""},
        {"wrapped_key": bytes(16385)},
        {"owner_uid": -1},
        {"owner_gid": 1 << 32},
        {"epoch": 0},
        {"created_at": datetime(2026, 1, 1)},
        {"permit": Permit(PermitState.CONSUMED, bytes(16))},
        {"state_version": 1},
    ],
)
def test_new_record_is_refused_when_a_field_is_out_of_bounds(change: dict[str, object]) -> None:
    check_new_record(new_record())
    with pytest.raises(UsageError):
        check_new_record(dataclasses.replace(new_record(), **change))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": ""},
        {"kind": "a\nb"},
        {"time": datetime(2026, 1, 1)},
        {"actor_uid": -1},
        {"vtpm_name": "a/b"},
        {"detail": "no json"},
        {"detail": "[]"},
        {"detail": '{"a": "' + "x" * 20000 + '"}'},
    ],
)
def test_event_is_refused_when_a_field_is_out_of_bounds(change: dict[str, object]) -> None:
    event = Event(CREATED, 0, "created", "web1", None, '{"a": 1}')
    check_event(event)
    with pytest.raises(UsageError):
        check_event(dataclasses.replace(event, **change))


def test_key_and_permit_are_not_shown_when_record_is_printed() -> None:
    record = dataclasses.replace(new_record(), permit=Permit(PermitState.ISSUED, b"permitpermitperm"))
    assert "wrapped key" not in repr(record)
    assert "permitpermit" not in repr(record)


@pytest.mark.parametrize("kind", DomainKind)
def test_kind_is_a_place_and_a_make_and_nothing_more(kind: DomainKind) -> None:
    assert DomainKind.of(kind.place, kind.make) is kind
    assert kind.place in [name.value for name in DomainName]
    assert kind.value == (kind.place if kind.make is Make.LIBTPMS else f"{kind.place}-{kind.make}")
    assert [name.value for name in ImageKind] == [kind.value for kind in DomainKind]
    assert TpmVersion.V2_0 in kind.tpm_versions


@pytest.mark.parametrize("place", ["process", "xen", "other"])
def test_kind_is_refused_when_nothing_there_runs_the_make(place: str) -> None:
    with pytest.raises(UsageError, match=f"{place} domains do not run vTPMs of the make swtpm") as refused:
        DomainKind.of(place, Make.SWTPM)
    assert refused.value.next_step == "Use --domain qemu"
