"""Backups: a stopped vTPM sealed into one file, and vTPMs that begin with the state of a backup or of an swtpm.

Administrators' alone: whoever has a backup and its key is that TPM, and whoever imports may make two of one. Plain
state is in this process while a file is sealed or opened, and leaves it sealed only. Each export and import is audited.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from uuid import uuid4

from vtpm.errors import ConflictError, UsageError
from vtpm.manager.access import Caller
from vtpm.manager.lifecycle import Happening
from vtpm.manager.running import event_of
from vtpm.manager.service import DELETED, ManagerService
from vtpm.recovery_key import RecoveryKey, RecoveryPublicKey
from vtpm.secret import Secret
from vtpm.tpm.types import MAX_STATE_BYTES, StateKind, VtpmId
from vtpm.vault import backup
from vtpm.vault.contents import Contents, begin, carried, open_all
from vtpm.vault.passphrase import Passphrase
from vtpm.vault.records import DomainKind, Event, PermitState, SavedState, VtpmRecord, valid_name
from vtpm.wire.api import ExportedVtpm, ExportVtpm, ImportBackup, ImportSwtpm, Vtpm
from vtpm.wire.call_threads import CallThreads
from vtpm.wire.keeper_client import KeeperClient

MAX_SOURCE_CHARS = 4096
_IMPORTED_AS = DomainKind.PROCESS
"""What comes of a backup: nothing in it says what it was."""


class BackupService:
    """See the module.

    Args:
        keeper: asked in one of the threads, for it blocks and may hang.
        threads: of these calls alone.
        vtpms: whose vTPMs these are.
    """

    def __init__(self, keeper: KeeperClient, threads: CallThreads, vtpms: ManagerService) -> None:
        self._keeper = keeper
        self._threads = threads
        self._vtpms = vtpms
        # scrypt takes 128 MiB and more: what all together take is bounded by doing one at a time.
        self._one_at_a_time = asyncio.Lock()

    async def export(self, name: str, wanted: ExportVtpm, caller: Caller) -> ExportedVtpm:
        """Seal a stopped vTPM's state into a backup, which is noted before it is handed out."""
        caller.require_admin("export vTPMs")
        to = await self._recipient(wanted)
        async with self._one_at_a_time, self._vtpms.held(name, caller, Happening.EXPORT) as held:
            record, saved = await self._vtpms.door.run(
                lambda store: (store.get_vtpm(held.id), store.read_state(held.id))
            )
            if record.domain.make is not _IMPORTED_AS.make:
                raise ConflictError(
                    f"vTPM {name} is of the make {record.domain.make}; a backup is imported as one of the make"
                    f" {_IMPORTED_AS.make}, which cannot read it"
                )
            if record.permit.state is not PermitState.CONSUMED:
                raise ConflictError(
                    f"vTPM {name} was never started, so it has no state", next_step="Create it anew where it is needed"
                )
            key = Secret(await self._vtpms.key(record))
            exported_at = datetime.now(UTC)
            blob = await asyncio.to_thread(_sealed, key, record, saved, exported_at, to)
            sealed_to = backup.sealed_to(blob) or ""
            event = event_of(
                caller.uid, "exported", record, epoch=record.epoch, version=record.state_version, sealed_to=sealed_to
            )
            await self._vtpms.audit.append(event)
        encoded = await asyncio.to_thread(base64.b64encode, blob)
        return ExportedVtpm(
            record.name, record.id, record.epoch, exported_at.isoformat(), sealed_to, encoded.decode("ascii")
        )

    async def import_backup(self, wanted: ImportBackup, caller: Caller) -> Vtpm:
        """Register a vTPM with the uuid and the state of a backup, in an epoch that neither has had before."""
        caller.require_admin("import vTPMs")
        if not wanted.original_is_dead:
            raise UsageError(
                "a backup is imported only when its original is dead: else there are two of one TPM",
                next_step="See that the original runs nowhere and never will, then say --original-is-dead",
            )
        opener = _opener(wanted)
        async with self._one_at_a_time:
            found = await asyncio.to_thread(lambda: backup.open_(_decoded("backup", wanted.backup), opener))
        record = VtpmRecord(
            id=found.vtpm_id,
            name=found.name if wanted.name is None else valid_name(wanted.name),
            owner_uid=found.owner_uid,
            owner_gid=found.owner_gid,
            vm_uuid=found.vm_uuid,
            tpm_version=found.tpm_version,
            domain=_IMPORTED_AS,
            created_at=datetime.now(UTC),
            epoch=max(found.epoch, await self._passed_epoch(found.vtpm_id)) + 1,
            state_version=found.state_version,
        )
        event = event_of(
            caller.uid,
            "imported",
            record,
            source="backup",
            uuid=found.vtpm_id,
            exported_name=found.name,
            exported_epoch=found.epoch,
            exported_at=found.exported_at.isoformat(),
            epoch=record.epoch,
        )
        contents = Contents(carried(found.tpm_version, found.states), found.engine_version)
        return await self._add(record, contents, event)

    async def import_swtpm(self, wanted: ImportSwtpm, caller: Caller) -> Vtpm:
        """Register a new vTPM, the caller's, that begins with the state of an swtpm."""
        caller.require_admin("import vTPMs")
        given = {StateKind.PERMANENT: wanted.permanent, StateKind.SAVESTATE: wanted.savestate}
        states = {kind: _decoded(kind.name.lower(), text) for kind, text in given.items() if text}
        if StateKind.PERMANENT not in states or any(len(state) > MAX_STATE_BYTES for state in states.values()):
            raise UsageError(f"a TPM's permanent state has 1 to {MAX_STATE_BYTES} bytes, as has any other")
        if len(wanted.source) > MAX_SOURCE_CHARS:
            raise UsageError(f"the name of the source has more than {MAX_SOURCE_CHARS} characters")
        record = VtpmRecord(
            id=VtpmId(uuid4()),
            name=valid_name(wanted.name),
            owner_uid=caller.uid,
            owner_gid=caller.gid,
            vm_uuid=wanted.vm_uuid,
            tpm_version=wanted.tpm_version,
            domain=_IMPORTED_AS,
            created_at=datetime.now(UTC),
        )
        event = event_of(caller.uid, "imported", record, source="swtpm", directory=wanted.source, uuid=record.id)
        return await self._add(record, Contents(carried(wanted.tpm_version, states)), event)

    async def _passed_epoch(self, vtpm_id: VtpmId) -> int:
        """Return the last epoch of a vTPM of this uuid that is known here: it was deleted, or moved; 0: none is."""
        event, known = await self._vtpms.door.run(
            lambda store: (store.last_event(vtpm_id, DELETED), store.holding(vtpm_id))
        )
        deleted = 0 if event is None else int(json.loads(event.detail).get("epoch", 0))
        return max(deleted, known.holding.epoch)

    async def _add(self, record: VtpmRecord, contents: Contents, event: Event) -> Vtpm:
        new_key = await self._threads.run(self._keeper.new_key, record.id)
        keyed = replace(record, wrapped_key=new_key.wrapped)
        begun, states = await asyncio.to_thread(begin, keyed, Secret(new_key.key), contents)
        return await self._vtpms.add(begun, states, event)

    async def _recipient(self, wanted: ExportVtpm) -> RecoveryPublicKey | Passphrase:
        if wanted.recovery_key is not None and wanted.passphrase is not None:
            raise UsageError("a backup is sealed to a recovery key or to a passphrase, not to both")
        if wanted.passphrase is not None:
            return Passphrase(wanted.passphrase)
        text = wanted.recovery_key
        if text is None:
            text = await self._threads.run(self._keeper.recovery_public_key)
            if not text:
                raise UsageError(
                    "this host knows no recovery key that the backup could be sealed to",
                    next_step="Make one with vtpm recovery-key, or give --recovery-key or --passphrase-file",
                )
        return RecoveryPublicKey.from_text(text)


def _opener(wanted: ImportBackup) -> RecoveryKey | Passphrase:
    if (wanted.recovery_key is None) == (wanted.passphrase is None):
        raise UsageError("a backup is opened by a recovery key or by a passphrase: give one of them")
    if wanted.passphrase is not None:
        return Passphrase(wanted.passphrase)
    return RecoveryKey.from_text(wanted.recovery_key or "")


def _sealed(
    key: Secret,
    record: VtpmRecord,
    saved: Sequence[SavedState],
    exported_at: datetime,
    to: RecoveryPublicKey | Passphrase,
) -> bytes:
    contents = open_all(key, record, saved)
    key.wipe()
    return backup.seal(backup.backup_of(record, contents, exported_at), to)


def _decoded(what: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError(f"the {what} is not base64") from None
