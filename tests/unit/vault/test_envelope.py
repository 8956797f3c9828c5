from __future__ import annotations

import dataclasses
import hmac
import json
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from vtpm.errors import ProtocolError, StateError
from vtpm.secret import Secret
from vtpm.tpm.types import MAX_STATE_BYTES, InstanceId, StateKind, TpmVersion, VtpmId
from vtpm.vault import envelope
from vtpm.vault.envelope import Expected, StateMeta, open_, save_digest, seal

VECTORS = Path(__file__).parents[2] / "vectors" / "state"
KEY = Secret(bytes(range(32)))
META = StateMeta(VtpmId(uuid4()), StateKind.PERMANENT, TpmVersion.V2_0, 3, 7, 0x000902)
EXPECTED = Expected(META.vtpm_id, META.kind, META.tpm_version, 3, 7, 0x000902)


def vectors() -> list[dict[str, str | int]]:
    return json.loads((VECTORS / "envelope-v1.json").read_text())


def independent_read(key: bytes, blob: bytes) -> tuple[dict[str, object], bytes]:
    """Read an envelope by the words of docs/state-format.md, with nothing of vtpm and HKDF from its RFC."""
    number = int.from_bytes
    assert blob[0:8] == b"VTPMSTAT"
    assert number(blob[8:10], "big") == 1
    assert number(blob[10:12], "big") == 88
    assert blob[30:32] == b"\0\0"
    n = number(blob[52:56], "big")
    assert len(blob) == 88 + n + 16
    fields = {
        "uuid": str(UUID(bytes=blob[12:28])),
        "kind": blob[28],
        "tpm_version": blob[29],
        "epoch": number(blob[32:40], "big"),
        "version": number(blob[40:48], "big"),
        "engine_version": number(blob[48:52], "big"),
    }
    pseudo_random_key = hmac.digest(blob[56:88], key, "sha256")
    info = b"vtpm state v1" + blob[12:29]
    blob_key = hmac.digest(pseudo_random_key, info + b"\x01", "sha256")
    decryptor = Cipher(algorithms.AES(blob_key), modes.GCM(bytes(12), blob[88 + n :])).decryptor()
    decryptor.authenticate_additional_data(blob[:88])
    return fields, decryptor.update(blob[88 : 88 + n]) + decryptor.finalize()


@pytest.mark.parametrize("vector", vectors(), ids=lambda v: v["name"])
def test_independent_reader_agrees_when_vector_is_frozen(vector: dict[str, str]) -> None:
    fields, plaintext = independent_read(bytes.fromhex(vector["key"]), bytes.fromhex(vector["envelope"]))
    assert plaintext == bytes.fromhex(vector["plaintext"])
    assert fields == {name: vector[name] for name in fields}


@pytest.mark.parametrize("vector", vectors(), ids=lambda v: v["name"])
def test_same_bytes_are_sealed_and_opened_when_vector_is_frozen(
    vector: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, blob = Secret(bytes.fromhex(vector["key"])), bytes.fromhex(vector["envelope"])
    tpm_version = {12: TpmVersion.V1_2, 20: TpmVersion.V2_0}[int(vector["tpm_version"])]
    meta = StateMeta(
        VtpmId(UUID(vector["uuid"])),
        StateKind(vector["kind"]),
        tpm_version,
        int(vector["epoch"]),
        int(vector["version"]),
        int(vector["engine_version"]),
    )
    plaintext = bytes.fromhex(vector["plaintext"])
    assert open_(key, Expected(**dataclasses.asdict(meta)), blob) == plaintext
    monkeypatch.setattr(envelope.secrets, "token_bytes", lambda count: blob[56 : 56 + count])
    assert seal(key, meta, plaintext) == blob


def test_independent_reader_agrees_when_sealed_just_now() -> None:
    _, plaintext = independent_read(KEY.reveal(), seal(KEY, META, b"state" * 1000))
    assert plaintext == b"state" * 1000


def test_envelopes_differ_when_the_same_state_is_sealed_twice() -> None:
    first, second = seal(KEY, META, b"state"), seal(KEY, META, b"state")
    assert first[56:88] != second[56:88]
    assert first[88:] != second[88:]


def test_refused_when_any_bit_is_flipped() -> None:
    blob = seal(KEY, META, b"twenty bytes of data")
    for position in range(len(blob)):
        for bit in range(8):
            changed = bytearray(blob)
            changed[position] ^= 1 << bit
            # The engine version's low bits may be lowered; the tag has to notice that.
            with pytest.raises(StateError):
                open_(KEY, EXPECTED, bytes(changed))


def test_refused_when_cut_or_extended_anywhere() -> None:
    blob = seal(KEY, META, b"twenty bytes of data")
    for length in range(len(blob)):
        with pytest.raises(StateError, match="damaged"):
            open_(KEY, EXPECTED, blob[:length])
    with pytest.raises(StateError, match="damaged"):
        open_(KEY, EXPECTED, blob + b"\0")
    with pytest.raises(StateError, match="damaged"):
        open_(KEY, EXPECTED, bytes(envelope.MAX_ENVELOPE_BYTES + 1))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"vtpm_id": VtpmId(uuid4())}, "foreign"),
        ({"kind": StateKind.VOLATILE}, "another kind"),
        ({"tpm_version": TpmVersion.V1_2}, "another TPM version"),
        ({"epoch": 2}, "another epoch"),
        ({"epoch": 4}, "another epoch"),
        ({"version": 6}, "older version"),
        ({"version": 8}, "later version"),
        ({"engine_version": 0x000A00}, r"needs engine 0\.10\.0; this one is 0\.9\.2"),
    ],
)
def test_exact_cause_is_named_when_header_is_not_as_expected(change: dict[str, object], cause: str) -> None:
    blob = seal(KEY, dataclasses.replace(META, **change), b"state")
    with pytest.raises(StateError, match=cause):
        open_(KEY, EXPECTED, blob)


def test_opened_when_engine_is_newer_than_needed() -> None:
    newer = dataclasses.replace(EXPECTED, engine_version=0x000A03)
    assert open_(KEY, newer, seal(KEY, META, b"state")) == b"state"


def test_refused_when_format_version_is_unknown() -> None:
    blob = bytearray(seal(KEY, META, b"state"))
    blob[9] = 2
    with pytest.raises(StateError, match="format version 2"):
        open_(KEY, EXPECTED, bytes(blob))


def test_refused_when_key_is_anothers() -> None:
    blob = seal(Secret(bytes(32)), META, b"state")
    with pytest.raises(StateError, match="another key"):
        open_(KEY, EXPECTED, blob)


def test_refused_when_two_vtpms_blobs_are_swapped_and_headers_forged() -> None:
    other = dataclasses.replace(META, vtpm_id=VtpmId(uuid4()))
    mine, foreign = seal(KEY, META, b"mine!"), seal(KEY, other, b"other")
    # Even under one and the same key, a foreign body behind a right header is noticed.
    with pytest.raises(StateError, match="damaged"):
        open_(KEY, EXPECTED, mine[:56] + foreign[56:])


@pytest.mark.parametrize("size", [0, MAX_STATE_BYTES + 1])
def test_not_sealed_when_empty_or_too_large(size: int) -> None:
    with pytest.raises(ProtocolError, match=f"{size} bytes"):
        seal(KEY, META, bytes(size))


def test_sealed_and_opened_when_of_the_largest_size() -> None:
    assert open_(KEY, EXPECTED, seal(KEY, META, bytes(MAX_STATE_BYTES))) == bytes(MAX_STATE_BYTES)


@pytest.mark.parametrize("change", [{"epoch": 0}, {"version": 0}, {"version": 1 << 63}, {"engine_version": 1 << 32}])
def test_not_sealed_when_a_counter_is_out_of_bounds(change: dict[str, int]) -> None:
    with pytest.raises(StateError, match="out of bounds"):
        seal(KEY, dataclasses.replace(META, **change), b"state")


def test_save_digest_differs_when_anything_differs() -> None:
    instance, other = InstanceId(uuid4()), InstanceId(uuid4())
    kind = StateKind.PERMANENT
    base = save_digest(KEY, META.vtpm_id, instance, 1, kind, b"state")
    assert base == save_digest(KEY, META.vtpm_id, instance, 1, kind, b"state")
    others = {
        save_digest(Secret(bytes(32)), META.vtpm_id, instance, 1, kind, b"state"),
        save_digest(KEY, VtpmId(uuid4()), instance, 1, kind, b"state"),
        save_digest(KEY, META.vtpm_id, other, 1, kind, b"state"),
        save_digest(KEY, META.vtpm_id, instance, 2, kind, b"state"),
        save_digest(KEY, META.vtpm_id, instance, 1, StateKind.SAVESTATE, b"state"),
        save_digest(KEY, META.vtpm_id, instance, 1, kind, b"stat"),
    }
    assert len(others) == 6
    assert base not in others
