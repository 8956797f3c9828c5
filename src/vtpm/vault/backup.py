"""One vTPM in one file, for `vtpm export` and `vtpm import`; docs/state-format.md, "Backup file".

A backup opens for the holder of the recovery key or of the passphrase. It does not prove where it comes from: whoever
has the public recovery key, or the passphrase, can make one. And it is a state of the past: whoever imports it declares
that the original is dead.

Pure: bytes in, values out. Imported by the manager and its tools.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vtpm import recovery_key
from vtpm.errors import StateError, UsageError
from vtpm.recovery_key import ESCROW_BYTES, RecoveryKey, RecoveryPublicKey
from vtpm.secret import KEY_BYTES, Secret
from vtpm.tpm.types import MAX_STATE_BYTES, StateKind, TpmVersion, VtpmId
from vtpm.vault.contents import Contents
from vtpm.vault.envelope import TPM_CODES
from vtpm.vault.passphrase import Passphrase, ScryptCost
from vtpm.vault.records import MAX_COUNTER, MAX_ENGINE_VERSION, MAX_ID, VtpmRecord, valid_name

MAGIC = b"VTPMBKUP"
FORMAT_VERSION = 1
SALT_BYTES = 32
TAG_BYTES = 16

_HEADER = struct.Struct(f">8sHBBI{KEY_BYTES}s")
_SCRYPT = struct.Struct(f">BBBB{SALT_BYTES}s")
_FIELDS = struct.Struct(">16s16sBBHIIQQIQ")
_STATE = struct.Struct(">BI")
_TO_RECOVERY_KEY = 1
_TO_PASSPHRASE = 2
_OPENING_BYTES = {_TO_RECOVERY_KEY: ESCROW_BYTES, _TO_PASSPHRASE: _SCRYPT.size}

_MAX_NAME_BYTES = 63
_MAX_BODY_BYTES = _FIELDS.size + _MAX_NAME_BYTES + len(StateKind) * (_STATE.size + MAX_STATE_BYTES)
MAX_BACKUP_BYTES = _HEADER.size + max(_OPENING_BYTES.values()) + _MAX_BODY_BYTES + TAG_BYTES

# Constant, because every file has a key of its own.
_NONCE = bytes(12)
_INFO = b"vtpm backup v1"
_PURPOSE = "backup"
_TPM_VERSIONS = {code: version for version, code in TPM_CODES.items()}
_NO_UUID = UUID(int=0)
_EPOCH_START = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True)
class Backup:
    """All that makes up one vTPM.

    Args:
        name: see valid_name.
        owner_uid, owner_gid: 0 to MAX_ID.
        vm_uuid: of the VM it is bound to; not the nil uuid.
        epoch, state_version: 1 to MAX_COUNTER, as they were when it was exported.
        engine_version: least engine version that reads the state, MAJOR<<16 | MINOR<<8 | MICRO.
        exported_at: with a time zone, from 1970.
        states: plain state as libtpms wrote it, 1 to MAX_STATE_BYTES bytes each; permanent state is there.
    """

    vtpm_id: VtpmId
    name: str
    owner_uid: int
    owner_gid: int
    vm_uuid: UUID | None
    tpm_version: TpmVersion
    epoch: int
    state_version: int
    engine_version: int
    exported_at: datetime
    states: Mapping[StateKind, bytes] = field(repr=False)


def backup_of(record: VtpmRecord, contents: Contents, exported_at: datetime) -> Backup:
    """Return a vTPM with what is saved of it, as it was at a time; with a time zone."""
    return Backup(
        vtpm_id=record.id,
        name=record.name,
        owner_uid=record.owner_uid,
        owner_gid=record.owner_gid,
        vm_uuid=record.vm_uuid,
        tpm_version=record.tpm_version,
        epoch=record.epoch,
        state_version=record.state_version,
        engine_version=contents.engine_version,
        exported_at=exported_at,
        states=contents.states,
    )


def seal(backup: Backup, to: RecoveryPublicKey | Passphrase, cost: ScryptCost | None = None) -> bytes:
    """Write a backup file.

    Args:
        to: whose holder can open it.
        cost: for a passphrase; ScryptCost() if None.
    Returns:
        The file's content, at most MAX_BACKUP_BYTES.
    Raises:
        StateError: a field of the backup has no place in the file.
    """
    body = encode(backup)
    if isinstance(to, Passphrase):
        cost = cost or ScryptCost()
        salt = secrets.token_bytes(SALT_BYTES)
        opening = _SCRYPT.pack(cost.log2_n, cost.r, cost.p, 0, salt)
        body_key, check = _keys(to.stretch(salt, cost))
        header = _HEADER.pack(MAGIC, FORMAT_VERSION, _TO_PASSPHRASE, 0, len(body), check) + opening
    else:
        file_key = Secret(secrets.token_bytes(KEY_BYTES))
        body_key, check = _keys(file_key)
        header = _HEADER.pack(MAGIC, FORMAT_VERSION, _TO_RECOVERY_KEY, 0, len(body), check)
        header += to.seal(file_key, _PURPOSE, header)
    return header + AESGCM(body_key).encrypt(_NONCE, body, header)


def sealed_to(blob: bytes) -> str | None:
    """Say what a backup file asks for; nothing vouches for it until the file is opened.

    Returns:
        Fingerprint of the recovery key that opens it; None if it is a passphrase.
    Raises:
        StateError: not a backup file of a known format.
    """
    header = _read_header(blob)
    return recovery_key.recipient(header.opening) if header.protection == _TO_RECOVERY_KEY else None


def open_(blob: bytes, opener: RecoveryKey | Passphrase) -> Backup:
    """Verify a backup file and return what is in it; nothing is returned before all of it is verified.

    With a passphrase it takes up to 256 MiB of memory and a second, whatever the file says.

    Raises:
        StateError: damaged, of an unknown format, or sealed to another key or passphrase; the message says which.
        UsageError: a passphrase where the recovery key is needed, or the other way round.
    """
    header = _read_header(blob)
    body_key, check = _keys(_file_key(header, opener))
    if not hmac.compare_digest(check, header.check):
        raise StateError("this backup does not open: the passphrase is wrong, or the header is damaged")
    try:
        body = AESGCM(body_key).decrypt(_NONCE, blob[header.size_bytes :], blob[: header.size_bytes])
    except InvalidTag:
        raise StateError("this backup is damaged: its content is not what was sealed") from None
    return decode(body)


@dataclass(frozen=True)
class _Header:
    """Fixed part, still unverified."""

    protection: int
    check: bytes
    opening: bytes
    fixed: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.fixed) + len(self.opening)


def _read_header(blob: bytes) -> _Header:
    if not _HEADER.size <= len(blob) <= MAX_BACKUP_BYTES:
        raise StateError(f"this is no backup, or a damaged one: it has {len(blob)} bytes")
    magic, version, protection, reserved, body_bytes, check = _HEADER.unpack_from(blob)
    if magic != MAGIC:
        raise StateError("this is no backup: none begins like this")
    if version != FORMAT_VERSION:
        raise StateError(
            f"this backup has format version {version}; this program reads {FORMAT_VERSION}",
            next_step="Use the program that wrote it",
        )
    if protection not in _OPENING_BYTES:
        raise StateError(f"this backup is damaged: there is no protection {protection}")
    opening_bytes = _OPENING_BYTES[protection]
    # Exact lengths bound the body as well: the file's own size was bounded above.
    if reserved != 0 or len(blob) != _HEADER.size + opening_bytes + body_bytes + TAG_BYTES:
        raise StateError("this backup is damaged: its lengths do not agree")
    opening = blob[_HEADER.size : _HEADER.size + opening_bytes]
    return _Header(protection, check, opening, blob[: _HEADER.size])


def _file_key(header: _Header, opener: RecoveryKey | Passphrase) -> Secret:
    if isinstance(opener, Passphrase):
        if header.protection != _TO_PASSPHRASE:
            raise UsageError(
                "this backup is sealed to a recovery key, not to a passphrase",
                next_step=f"Use recovery key {recovery_key.recipient(header.opening)}",
            )
        log2_n, r, p, reserved, salt = _SCRYPT.unpack(header.opening)
        if reserved != 0:
            raise StateError("this backup is damaged: a reserved field is not zero")
        try:
            cost = ScryptCost(log2_n, r, p)
        except StateError as error:
            raise StateError(f"this backup is damaged or hostile: {error.message}") from error
        return opener.stretch(salt, cost)
    if header.protection != _TO_RECOVERY_KEY:
        raise UsageError(
            "this backup is sealed to a passphrase, not to a recovery key", next_step="Give the passphrase"
        )
    return opener.open(header.opening, _PURPOSE, header.fixed)


def _keys(file_key: Secret) -> tuple[bytes, bytes]:
    """Key of the body, and a value that tells a wrong passphrase from damage and commits to the key."""
    both = HKDF(SHA256(), 2 * KEY_BYTES, None, _INFO).derive(file_key.reveal())
    return both[:KEY_BYTES], both[KEY_BYTES:]


def encode(backup: Backup) -> bytes:
    """Return the body of a backup, in the clear. Raises StateError: a field has no place in it."""
    _check(backup)
    name = backup.name.encode("ascii")
    fields = _FIELDS.pack(
        backup.vtpm_id.bytes,
        (backup.vm_uuid or _NO_UUID).bytes,
        TPM_CODES[backup.tpm_version],
        len(backup.states),
        len(name),
        backup.owner_uid,
        backup.owner_gid,
        backup.epoch,
        backup.state_version,
        backup.engine_version,
        (backup.exported_at - _EPOCH_START) // _MICROSECOND,
    )
    states = [_STATE.pack(kind, len(blob)) + blob for kind, blob in sorted(backup.states.items())]
    return b"".join((fields, name, *states))


def _check(backup: Backup) -> None:
    try:
        valid_name(backup.name)
    except UsageError as error:
        raise StateError(f"this is no backup of a vTPM: {error.message}") from error
    counters = (backup.epoch, backup.state_version)
    if not all(1 <= counter <= MAX_COUNTER for counter in counters):
        raise StateError(f"backup of {backup.name!r}: epoch {counters[0]}, version {counters[1]} are out of bounds")
    ids = (backup.owner_uid, backup.owner_gid)
    if not all(0 <= number <= MAX_ID for number in ids) or not 0 <= backup.engine_version <= MAX_ENGINE_VERSION:
        raise StateError(f"backup of {backup.name!r}: owner {ids} or engine {backup.engine_version} is out of bounds")
    if backup.vm_uuid == _NO_UUID or backup.exported_at < _EPOCH_START:
        raise StateError(f"backup of {backup.name!r}: its VM's uuid is nil, or its time is before 1970")
    if StateKind.PERMANENT not in backup.states:
        raise StateError(f"backup of {backup.name!r} has no permanent state")
    if not all(1 <= len(blob) <= MAX_STATE_BYTES for blob in backup.states.values()):
        raise StateError(f"backup of {backup.name!r}: a state is empty or has more than {MAX_STATE_BYTES} bytes")


def decode(body: bytes) -> Backup:
    """Read a body that was verified; whoever sealed it may still have written nonsense.

    Raises:
        StateError: it is not exactly a body in the one form that `encode` writes.
    """
    try:
        backup = _decode_fields(body)
    except (struct.error, KeyError, ValueError, OverflowError) as error:
        raise StateError("this backup was sealed by another program: its content cannot be read") from error
    if encode(backup) != body:
        raise StateError("this backup is not in the one form that this program writes")
    return backup


def _decode_fields(body: bytes) -> Backup:
    (
        vtpm_id,
        vm_uuid,
        tpm_code,
        state_count,
        name_bytes,
        owner_uid,
        owner_gid,
        epoch,
        state_version,
        engine_version,
        exported_at_us,
    ) = _FIELDS.unpack_from(body)
    at = _FIELDS.size + name_bytes
    name = body[_FIELDS.size : at].decode("ascii")
    states = {}
    for _ in range(state_count):
        kind, size = _STATE.unpack_from(body, at)
        at += _STATE.size
        states[StateKind(kind)] = body[at : at + size]
        at += size
    bound_to = UUID(bytes=vm_uuid)
    return Backup(
        vtpm_id=VtpmId(UUID(bytes=vtpm_id)),
        name=name,
        owner_uid=owner_uid,
        owner_gid=owner_gid,
        vm_uuid=None if bound_to == _NO_UUID else bound_to,
        tpm_version=_TPM_VERSIONS[tpm_code],
        epoch=epoch,
        state_version=state_version,
        engine_version=engine_version,
        exported_at=_EPOCH_START + exported_at_us * _MICROSECOND,
        states=states,
    )
