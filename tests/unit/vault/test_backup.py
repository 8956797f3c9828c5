from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import tracemalloc
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tests.unit.test_recovery_key import independent_open, independent_text
from vtpm.errors import StateError, UsageError
from vtpm.recovery_key import RecoveryKey
from vtpm.tpm.types import MAX_STATE_BYTES, StateKind, TpmVersion, VtpmId
from vtpm.vault import backup as backup_module
from vtpm.vault.backup import MAX_BACKUP_BYTES, Backup, backup_of, open_, seal, sealed_to
from vtpm.vault.contents import Contents
from vtpm.vault.passphrase import MAX_LOG2_N, MIN_LOG2_N, Passphrase, ScryptCost
from vtpm.vault.records import DomainKind, VtpmRecord

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "state" / "backup-v1.json").read_text())
KEY = RecoveryKey.generate()
WORDS = Passphrase("correct horse battery")
CHEAP = ScryptCost(MIN_LOG2_N)
BACKUP = Backup(
    vtpm_id=VtpmId(uuid4()),
    name="web1",
    owner_uid=1000,
    owner_gid=1001,
    vm_uuid=uuid4(),
    tpm_version=TpmVersion.V2_0,
    epoch=3,
    state_version=70,
    engine_version=0x000902,
    exported_at=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
    states={StateKind.PERMANENT: b"permanent state", StateKind.VOLATILE: b"volatile"},
)


def independent_read(blob: bytes, *, key: str | None = None, passphrase: bytes | None = None) -> dict[str, Any]:
    """Read a backup by the words of docs/state-format.md, with nothing of vtpm, and HKDF and HPKE from their RFCs."""
    number = lambda data: int.from_bytes(data, "big")  # noqa: E731
    assert blob[0:8] == b"VTPMBKUP"
    assert number(blob[8:10]) == 1
    assert blob[11] == 0
    n = number(blob[12:16])
    if blob[10] == 1:
        assert key is not None
        header = blob[:158]
        file_key = independent_open(independent_text(key, "VTPM-RECOVERY-KEY-1"), blob[48:158], "backup", blob[:48])
    else:
        assert blob[10] == 2
        assert passphrase is not None
        header = blob[:84]
        log2_n, r, p, reserved = blob[48:52]
        assert reserved == 0
        file_key = hashlib.scrypt(passphrase, salt=blob[52:84], n=1 << log2_n, r=r, p=p, maxmem=1 << 29, dklen=32)
    assert len(blob) == len(header) + n + 16
    pseudo_random_key = hmac.digest(bytes(32), file_key, "sha256")
    body_key = hmac.digest(pseudo_random_key, b"vtpm backup v1\x01", "sha256")
    assert hmac.digest(pseudo_random_key, body_key + b"vtpm backup v1\x02", "sha256") == blob[16:48]
    decryptor = Cipher(algorithms.AES(body_key), modes.GCM(bytes(12), blob[-16:])).decryptor()
    decryptor.authenticate_additional_data(header)
    body = decryptor.update(blob[len(header) : -16]) + decryptor.finalize()
    assert len(body) == n
    name_end = 72 + number(body[34:36])
    fields: dict[str, Any] = {
        "uuid": str(UUID(bytes=body[0:16])),
        "vm_uuid": str(UUID(bytes=body[16:32])) if any(body[16:32]) else None,
        "tpm_version": body[32],
        "name": body[72:name_end].decode("ascii"),
        "owner_uid": number(body[36:40]),
        "owner_gid": number(body[40:44]),
        "epoch": number(body[44:52]),
        "state_version": number(body[52:60]),
        "engine_version": number(body[60:64]),
        "exported_at_us": number(body[64:72]),
        "states": {},
    }
    rest = body[name_end:]
    for _ in range(body[33]):
        size = number(rest[1:5])
        fields["states"][str(rest[0])] = rest[5 : 5 + size].hex()
        rest = rest[5 + size :]
    assert rest == b""
    return fields


def words(backup: Backup) -> dict[str, Any]:
    """A backup as the vectors write it."""
    return {
        "uuid": str(backup.vtpm_id),
        "vm_uuid": str(backup.vm_uuid) if backup.vm_uuid else None,
        "tpm_version": {"1.2": 12, "2.0": 20}[backup.tpm_version],
        "name": backup.name,
        "owner_uid": backup.owner_uid,
        "owner_gid": backup.owner_gid,
        "epoch": backup.epoch,
        "state_version": backup.state_version,
        "engine_version": backup.engine_version,
        "exported_at_us": (backup.exported_at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1),
        "states": {str(int(kind)): blob.hex() for kind, blob in backup.states.items()},
    }


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
def test_independent_reader_agrees_when_vector_is_frozen(vector: dict[str, Any]) -> None:
    passphrase = vector["passphrase"]
    read = independent_read(
        bytes.fromhex(vector["file"]), key=vector["key"], passphrase=passphrase and passphrase.encode()
    )
    assert read == vector["content"]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
def test_same_content_is_opened_and_same_bytes_are_sealed_when_vector_is_frozen(
    vector: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = bytes.fromhex(vector["file"])
    opener = RecoveryKey.from_text(vector["key"]) if vector["key"] else Passphrase(vector["passphrase"])
    opened = open_(blob, opener)
    assert words(opened) == vector["content"]
    if isinstance(opener, Passphrase):
        assert sealed_to(blob) is None
        monkeypatch.setattr(backup_module.secrets, "token_bytes", lambda count: blob[52 : 52 + count])
        assert seal(opened, opener, ScryptCost(blob[48])) == blob
    else:
        assert sealed_to(blob) == opener.public.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"vm_uuid": None},
        {"name": "x" * 63},
        {"tpm_version": TpmVersion.V1_2, "states": {kind: bytes([kind]) for kind in StateKind}},
        {"states": {StateKind.SAVESTATE: b"s", StateKind.PERMANENT: b"p"}},
        {"owner_uid": 0, "owner_gid": 2**32 - 2, "epoch": 2**63 - 1, "state_version": 1, "engine_version": 2**32 - 1},
    ],
)
def test_backup_comes_back_and_the_independent_reader_agrees(change: dict[str, Any]) -> None:
    backup = dataclasses.replace(BACKUP, **change)
    blob = seal(backup, KEY.public)
    assert open_(blob, KEY) == backup
    assert independent_read(blob, key=KEY.to_text()) == words(backup)
    blob = seal(backup, WORDS, CHEAP)
    assert open_(blob, WORDS) == backup
    assert independent_read(blob, passphrase=b"correct horse battery") == words(backup)


def test_backup_comes_back_when_states_are_of_the_largest_size() -> None:
    backup = dataclasses.replace(
        BACKUP, name="x" * 63, states={kind: bytes([kind]) * MAX_STATE_BYTES for kind in StateKind}
    )
    blob = seal(backup, KEY.public)
    assert len(blob) == MAX_BACKUP_BYTES
    assert open_(blob, KEY) == backup


def test_files_differ_when_the_same_is_sealed_twice() -> None:
    for to in (KEY.public, WORDS):
        first, second = seal(BACKUP, to, CHEAP), seal(BACKUP, to, CHEAP)
        assert first[-60:] != second[-60:]
        assert first[16:48] != second[16:48]


def test_default_cost_is_the_documented_one() -> None:
    blob = seal(BACKUP, WORDS)
    assert blob[48:52] == bytes([17, 8, 1, 0])
    assert open_(blob, WORDS) == BACKUP


def test_neither_state_nor_name_is_shown_when_printed_or_looked_for_in_the_file() -> None:
    assert "permanent state" not in repr(BACKUP)
    blob = seal(BACKUP, KEY.public)
    for hidden in (b"web1", b"permanent", BACKUP.vtpm_id.bytes, BACKUP.vm_uuid.bytes if BACKUP.vm_uuid else b"?"):
        assert hidden not in blob


def test_refused_when_any_bit_is_flipped() -> None:
    blob = seal(BACKUP, KEY.public)
    for position in range(len(blob)):
        for bit in range(8):
            changed = bytearray(blob)
            changed[position] ^= 1 << bit
            # One bit of the protection makes it look like the other one.
            with pytest.raises((StateError, UsageError)):
                open_(bytes(changed), KEY)


def test_refused_when_any_byte_is_flipped_under_a_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = seal(BACKUP, WORDS, CHEAP)
    # The same salt and cost give the same key; so this takes seconds and not a minute.
    monkeypatch.setattr(Passphrase, "stretch", cache(Passphrase.stretch))
    for position in range(len(blob)):
        changed = bytearray(blob)
        changed[position] ^= 0x01
        with pytest.raises((StateError, UsageError)):
            open_(bytes(changed), WORDS)


@pytest.mark.parametrize(("to", "opener"), [(KEY.public, KEY), (WORDS, WORDS)], ids=["key", "passphrase"])
def test_refused_when_cut_or_extended_anywhere(to: Any, opener: Any) -> None:
    blob = seal(BACKUP, to, CHEAP)
    for length in range(len(blob)):
        with pytest.raises(StateError, match=r"damaged"):
            open_(blob[:length], opener)
        with pytest.raises(StateError):
            sealed_to(blob[:length])
    with pytest.raises(StateError, match="lengths"):
        open_(blob + b"\0", opener)
    with pytest.raises(StateError, match=f"{MAX_BACKUP_BYTES + 1} bytes"):
        open_(blob.ljust(MAX_BACKUP_BYTES + 1, b"\0"), opener)


def test_cause_is_named_when_key_or_passphrase_is_wrong_or_of_the_other_kind() -> None:
    to_key, to_words = seal(BACKUP, KEY.public), seal(BACKUP, WORDS, CHEAP)
    other = RecoveryKey.generate()
    with pytest.raises(StateError, match=f"sealed to recovery key {KEY.public.fingerprint}"):
        open_(to_key, other)
    with pytest.raises(StateError, match="the passphrase is wrong"):
        open_(to_words, Passphrase("correct horse batterz"))
    with pytest.raises(UsageError, match=f"Use recovery key {KEY.public.fingerprint}"):
        open_(to_key, WORDS)
    with pytest.raises(UsageError, match="Give the passphrase"):
        open_(to_words, KEY)


def test_cause_is_named_when_file_is_of_another_format() -> None:
    blob = seal(BACKUP, KEY.public)
    for at, value, cause in [
        (0, 0, "no backup"),
        (9, 2, "format version 2"),
        (10, 3, "no protection 3"),
        (11, 1, "lengths"),
    ]:
        changed = bytearray(blob)
        changed[at] = value
        with pytest.raises(StateError, match=cause):
            open_(bytes(changed), KEY)


@pytest.mark.parametrize(
    "parameters",
    [
        bytes([MAX_LOG2_N + 1, 8, 1, 0]),
        bytes([63, 8, 1, 0]),
        bytes([255, 255, 255, 0]),
        bytes([0, 8, 1, 0]),
        bytes([MIN_LOG2_N - 1, 8, 1, 0]),
        bytes([17, 255, 1, 0]),
        bytes([17, 0, 1, 0]),
        bytes([17, 8, 255, 0]),
        bytes([17, 8, 0, 0]),
        bytes([17, 8, 1, 1]),
    ],
    ids=lambda parameters: parameters.hex(),
)
def test_nothing_is_stretched_when_scrypt_parameters_are_hostile(
    parameters: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = seal(BACKUP, WORDS, CHEAP)
    stretched: list[ScryptCost] = []
    monkeypatch.setattr(Passphrase, "stretch", lambda self, salt, cost: stretched.append(cost))
    with pytest.raises(StateError, match=r"hostile|reserved"):
        open_(blob[:48] + parameters + blob[52:], WORDS)
    assert stretched == []


def test_parts_of_two_files_do_not_go_together() -> None:
    one, two = seal(BACKUP, KEY.public), seal(dataclasses.replace(BACKUP, name="web2"), KEY.public)
    for at in (17, 48, 78, 110, 158, len(one) - 16):
        with pytest.raises(StateError):
            open_(one[:at] + two[at:], KEY)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"name": "../etc"}, "not a name"),
        ({"name": ""}, "not a name"),
        ({"epoch": 0}, "epoch 0"),
        ({"epoch": 2**63}, "out of bounds"),
        ({"state_version": 0}, "version 0"),
        ({"owner_uid": 2**32 - 1}, "owner"),
        ({"owner_gid": -1}, "owner"),
        ({"engine_version": 2**32}, "engine"),
        ({"vm_uuid": UUID(int=0)}, "nil"),
        ({"exported_at": datetime(1969, 12, 31, tzinfo=UTC)}, "before 1970"),
        ({"states": {}}, "no permanent state"),
        ({"states": {StateKind.VOLATILE: b"v"}}, "no permanent state"),
        ({"states": {StateKind.PERMANENT: b""}}, "is empty"),
        ({"states": {StateKind.PERMANENT: bytes(MAX_STATE_BYTES + 1)}}, "more than"),
    ],
)
def test_not_sealed_when_a_field_is_out_of_bounds(change: dict[str, Any], cause: str) -> None:
    with pytest.raises(StateError, match=cause):
        seal(dataclasses.replace(BACKUP, **change), KEY.public)


def forged(monkeypatch: pytest.MonkeyPatch, body: bytes) -> bytes:
    """A file as somebody seals it who knows the public key and writes what he likes."""
    with monkeypatch.context() as patch:
        patch.setattr(backup_module, "encode", lambda backup: body)
        return seal(BACKUP, KEY.public)


def hostile_bodies() -> dict[str, bytes]:
    good = backup_module.encode(BACKUP)
    permanent, volatile = good[76:96], good[96:]
    assert permanent == b"\x01\0\0\0\x0fpermanent state"

    def put(at: int, data: bytes) -> bytes:
        return good[:at] + data + good[at + len(data) :]

    return {
        "empty name": good[:34] + b"\0\0" + good[36:72] + good[76:],
        "name is a path": put(72, b"../x"),
        "name is no ASCII": put(72, b"\xff\xff\xff\xff"),
        "name beyond the end": put(34, b"\xff\xff"),
        "unknown TPM version": put(32, b"\x15"),
        "epoch 0": put(44, bytes(8)),
        "epoch too large": put(44, b"\xff" * 8),
        "uid is nobody's": put(36, b"\xff" * 4),
        "time beyond the calendar": put(64, b"\xff" * 8),
        "no states": put(33, b"\0")[:76],
        "one state fewer than there are": put(33, b"\x01"),
        "more states than there are": put(33, b"\xff"),
        "unknown kind": put(76, b"\x09"),
        "state beyond the end": put(97, b"\xff" * 4),
        "state cut": good[:-1],
        "something at the end": good + b"\0",
        "states in another order": good[:76] + volatile + permanent,
        "one state twice": good[:76] + permanent + permanent,
        "fields cut": good[:71],
        "almost nothing": b"\0",
    }


@pytest.mark.parametrize("body", hostile_bodies().values(), ids=hostile_bodies().keys())
def test_refused_when_sealed_content_is_not_what_this_program_writes(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = forged(monkeypatch, body)
    with pytest.raises(StateError):
        open_(blob, KEY)


def test_file_opens_when_forged_with_content_as_this_program_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # The forging itself does not break a file, so the refusals above are the content's.
    assert open_(forged(monkeypatch, backup_module.encode(BACKUP)), KEY) == BACKUP


def test_refused_when_check_value_is_not_the_file_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = backup_module._keys
    with monkeypatch.context() as patch:
        patch.setattr(backup_module, "_keys", lambda file_key: (keys(file_key)[0], bytes(32)))
        blob = seal(BACKUP, KEY.public)
    with pytest.raises(StateError, match="does not open"):
        open_(blob, KEY)


def test_memory_stays_bounded_when_a_large_file_is_refused() -> None:
    blob = bytearray(seal(BACKUP, KEY.public).ljust(MAX_BACKUP_BYTES, b"\0"))
    blob[12:16] = b"\xff" * 4
    data = bytes(blob)
    tracemalloc.start()
    with pytest.raises(StateError, match="lengths"):
        open_(data, KEY)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100_000


def test_vtpm_is_written_down_with_all_that_makes_it_up() -> None:
    record = VtpmRecord(
        id=BACKUP.vtpm_id,
        name=BACKUP.name,
        owner_uid=BACKUP.owner_uid,
        owner_gid=BACKUP.owner_gid,
        vm_uuid=BACKUP.vm_uuid,
        tpm_version=BACKUP.tpm_version,
        domain=DomainKind.PROCESS,
        created_at=BACKUP.exported_at,
        epoch=BACKUP.epoch,
        state_version=BACKUP.state_version,
    )
    assert backup_of(record, Contents(BACKUP.states, BACKUP.engine_version), BACKUP.exported_at) == BACKUP
