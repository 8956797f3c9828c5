"""What tests of the vault share: records, bound vTPMs, requests."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID, uuid4

from vtpm.tpm.types import InstanceId, StateKind, TpmVersion, VtpmId
from vtpm.vault.records import DomainKind, SaveRequest, VtpmRecord
from vtpm.vault.store import Store

KEY = bytes(range(32))
ENGINE = 0x000902
CREATED = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def new_record(name: str = "web1", vtpm_id: UUID | None = None) -> VtpmRecord:
    return VtpmRecord(
        id=VtpmId(vtpm_id or uuid4()),
        name=name,
        owner_uid=1000,
        owner_gid=1001,
        vm_uuid=uuid4(),
        tpm_version=TpmVersion.V2_0,
        domain=DomainKind.PROCESS,
        created_at=CREATED,
        wrapped_key=b"wrapped key of " + name.encode(),
    )


@dataclass
class Bound:
    """One vTPM with a bound instance, and a counter for its saves."""

    record: VtpmRecord
    instance: InstanceId
    permit: bytes | None
    count: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def id(self) -> VtpmId:
        return self.record.id

    def save(
        self,
        data: bytes = b"sealed",
        *,
        kind: StateKind = StateKind.PERMANENT,
        seq: int | None = None,
        version: int | None = None,
        epoch: int = 1,
        permit: bytes | None = None,
        instance: InstanceId | None = None,
    ) -> SaveRequest:
        """The next save as the vault would hand it to the store; `data` stands for an envelope."""
        number = next(self.count) if seq is None else seq
        digest = hashlib.sha256(bytes([kind]) + data).digest()
        return SaveRequest(
            self.id,
            instance or self.instance,
            number,
            digest,
            kind,
            epoch,
            number if version is None else version,
            data,
            permit,
        )


def bind(store: Store, name: str = "web1") -> Bound:
    """Create a vTPM, bind an instance, issue the permit."""
    record = new_record(name)
    store.create_vtpm(record)
    instance = InstanceId(uuid4())
    store.bind_instance(record.id, instance)
    return Bound(record, instance, store.issue_permit(record.id, instance, ENGINE))


def manufacture(store: Store, name: str = "web1") -> Bound:
    """As bind, with the first permanent state saved as save 1, version 1."""
    bound = bind(store, name)
    (outcome,) = store.commit_saves([bound.save(b"first", permit=bound.permit)])
    assert not isinstance(outcome, Exception), outcome
    return bound


def rebind(store: Store, bound: Bound) -> Bound:
    """A new instance in place of the bound one."""
    instance = InstanceId(uuid4())
    store.bind_instance(bound.id, instance, replaces=bound.instance)
    return Bound(bound.record, instance, None)
