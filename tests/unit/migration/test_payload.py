"""A vTPM as it goes to another host: the same comes out, and nothing that was not written so."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import pytest

from tests.unit.vault.world import ENGINE, new_record
from vtpm.errors import StateError
from vtpm.migration.payload import PAYLOAD_VERSION, pack, unpack
from vtpm.secret import Secret
from vtpm.tpm.types import StateKind
from vtpm.vault.contents import Contents, begin
from vtpm.vault.records import DomainKind

STATES = {StateKind.PERMANENT: b"permanent", StateKind.VOLATILE: b"volatile"}
NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)


@pytest.mark.parametrize("kind", DomainKind)
def test_vtpm_comes_out_with_all_its_states_as_it_was_packed(kind: DomainKind) -> None:
    key = Secret(bytes(32))
    record, saved = begin(dataclasses.replace(new_record(), domain=kind, epoch=5), key, Contents(STATES, ENGINE))
    payload = unpack(pack(key, record, saved, NOW))
    assert (payload.kind, payload.vtpm.states, payload.vtpm.engine_version) == (kind, STATES, ENGINE)
    assert (payload.vtpm.vtpm_id, payload.vtpm.name, payload.vtpm.epoch) == (record.id, record.name, 5)
    assert (payload.vtpm.vm_uuid, payload.vtpm.exported_at) == (record.vm_uuid, NOW)
    assert b"permanent" not in repr(payload).encode()


def test_payload_is_refused_when_it_is_of_another_version_kind_or_length() -> None:
    key = Secret(bytes(32))
    record, saved = begin(new_record(), key, Contents(STATES, ENGINE))
    good = pack(key, record, saved, NOW)
    for bad, why in (
        (b"", "version 0"),
        (bytes([PAYLOAD_VERSION + 1]) + good[1:], "version 2"),
        (good[:1] + b"\x05" + good[2:], "does not know: 5"),
        (good[:1], "does not know: 0"),
        (good[:-1], "backup"),
        (good + b"x", "backup"),
    ):
        with pytest.raises(StateError, match=why):
            unpack(bad)
