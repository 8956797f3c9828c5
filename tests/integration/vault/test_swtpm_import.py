"""State that Debian's swtpm and swtpm_setup wrote comes to life in this project's engine, with all that was in it."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.processes import short_directory
from tests.support.swtpm import SwtpmPlatform
from tests.unit.engine import commands as c
from tests.unit.engine.isolated import in_process
from tests.unit.engine.memory import powered
from tests.unit.vault import swtpm_files
from vtpm.errors import ConflictError, StateError, UsageError
from vtpm.tpm.types import StateKind, TpmVersion
from vtpm.vault.swtpm_blob import Kdf, KeyFormat, SwtpmKey, open_blob
from vtpm.vault.swtpm_state import SwtpmState, read_state

INDEX_20, INDEX_12 = 0x01500001, 0x00001001
DATA = b"written by swtpm"
DIGEST = hashlib.sha256(b"event").digest()
PASSPHRASE = b"my passphrase\n"
HEX_128, HEX_256 = b"0x" + b"0f" * 16, b"5a" * 32 + b"\n"
# TPM2_ReadPublic of where swtpm_setup keeps the EK; TPM_ReadPubek with a nonce of zeros.
EK_20 = struct.pack(">HIII", 0x8001, 14, 0x173, 0x81010001)
EK_12 = struct.pack(">HII", 0x00C1, 30, 0x7C) + bytes(20)


@dataclass(frozen=True)
class Case:
    """One way to encrypt.

    Args:
        content: of the file with key or passphrase; empty for none.
        setup: options of swtpm_setup, FILE standing for that file; None where it knows no such way.
        run: option --key of swtpm.
    """

    content: bytes
    setup: list[str] | None
    run: str
    key: SwtpmKey | None


CASES = {
    "plain": Case(b"", [], "", None),
    "passphrase, default cipher": Case(
        PASSPHRASE, ["--pwdfile", "FILE"], "pwdfile=FILE", SwtpmKey.from_passphrase(PASSPHRASE)
    ),
    "passphrase, AES-128": Case(
        PASSPHRASE,
        ["--pwdfile", "FILE", "--cipher", "aes-128-cbc"],
        "pwdfile=FILE,mode=aes-128-cbc",
        SwtpmKey.from_passphrase(PASSPHRASE),
    ),
    "passphrase, AES-256, as libvirt": Case(
        b"s3cret",
        ["--pwdfile", "FILE", "--cipher", "aes-256-cbc"],
        "pwdfile=FILE,mode=aes-256-cbc",
        SwtpmKey.from_passphrase(b"s3cret"),
    ),
    "key file, AES-128": Case(
        HEX_128, ["--keyfile", "FILE"], "file=FILE,mode=aes-cbc", SwtpmKey.from_key_file(HEX_128)
    ),
    "key file, AES-256": Case(
        HEX_256,
        ["--keyfile", "FILE", "--cipher", "aes-256-cbc"],
        "file=FILE,mode=aes-256-cbc",
        SwtpmKey.from_key_file(HEX_256),
    ),
    "binary key file, AES-256": Case(
        bytes(range(32)),
        None,
        "file=FILE,format=binary,mode=aes-256-cbc",
        SwtpmKey.from_key_file(bytes(range(32)), KeyFormat.BINARY),
    ),
    "binary key file, AES-128": Case(
        bytes(range(16)), None, "file=FILE,format=binary", SwtpmKey.from_key_file(bytes(range(16)), KeyFormat.BINARY)
    ),
    "passphrase, SHA-512, AES-256": Case(
        PASSPHRASE,
        None,
        "pwdfile=FILE,kdf=sha512,mode=aes-256-cbc",
        SwtpmKey.from_passphrase(PASSPHRASE, Kdf.SHA512),
    ),
    "passphrase, SHA-512, AES-128": Case(
        PASSPHRASE, None, "pwdfile=FILE,kdf=sha512", SwtpmKey.from_passphrase(PASSPHRASE, Kdf.SHA512)
    ),
}


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


def made(directory: Path, case: Case, version: TpmVersion = TpmVersion.V2_0) -> SwtpmPlatform:
    """A TPM as swtpm_setup leaves it, powered off."""
    key_file = directory / "key"
    key_file.write_bytes(case.content)
    run = ["--key", case.run.replace("FILE", str(key_file))] if case.run else []
    platform = SwtpmPlatform(directory, version=version, arguments=run)
    platform.state_dir.mkdir()
    if case.setup is not None:
        setup = [word.replace("FILE", str(key_file)) for word in case.setup]
        kind = ["--tpm2"] * (version is TpmVersion.V2_0)
        subprocess.run(
            ["swtpm_setup", *kind, "--createek", "--tpmstate", str(platform.state_dir), *setup],
            check=True,
            timeout=60,
            capture_output=True,
        )
    return platform


def ask(version: TpmVersion, states: Mapping[StateKind, bytes], *commands: bytes) -> list[bytes]:
    """What the engine answers on this state."""
    engine, _ = powered(version, dict(states))
    return [engine.process(command) for command in commands]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ek_and_nv_value_are_there_when_state_is_imported(directory: Path, case: Case) -> None:
    platform = made(directory, case)
    looks = [EK_20, c.nv_read(INDEX_20, len(DATA))]
    with platform:
        *written, ek, nv = platform.run(c.nv_define(INDEX_20, len(DATA)), c.nv_write(INDEX_20, DATA), *looks)
        assert [c.code_of(response) for response in written] == [0, 0]
        assert c.nv_value(nv, len(DATA)) == DATA
        assert (c.code_of(ek) == 0) == (case.setup is not None)
        with pytest.raises(ConflictError, match="in use by a running swtpm"):
            read_state(platform.state_dir, case.key)
    state = read_state(platform.state_dir, case.key)
    assert state.tpm_version is TpmVersion.V2_0
    assert set(state.states) == {StateKind.PERMANENT}
    assert in_process(ask, TpmVersion.V2_0, state.states, c.startup(), *looks)[1:] == [ek, nv]


@pytest.mark.parametrize("name", ["plain", "passphrase, AES-256, as libvirt"])
def test_ek_and_nv_value_of_tpm_12_are_there_when_state_is_imported(directory: Path, name: str) -> None:
    case = CASES[name]
    platform = made(directory, case, TpmVersion.V1_2)
    looks = [EK_12, c.nv_read_12(INDEX_12, len(DATA))]
    with platform:
        *written, ek, nv, saved = platform.run(
            c.nv_define_12(INDEX_12, len(DATA)),
            c.nv_write_12(INDEX_12, DATA),
            c.pcr_extend_12(10, DIGEST[:20]),
            *looks,
            c.save_state_12(),
        )
        assert [c.code_of(response) for response in (*written, ek, saved)] == [0] * 5
        assert c.value_12(nv, len(DATA)) == DATA
    state = read_state(platform.state_dir, case.key)
    assert state.tpm_version is TpmVersion.V1_2
    assert set(state.states) == {StateKind.PERMANENT, StateKind.SAVESTATE}
    resumed = in_process(
        ask, TpmVersion.V1_2, state.states, c.startup_12(c.STARTUP_STATE_12), *looks, c.pcr_read_12(10), timeout_s=60
    )
    assert resumed[1:3] == [ek, nv]
    assert c.value_12(resumed[3], 20) == hashlib.sha1(bytes(20) + DIGEST[:20]).digest()


@pytest.mark.parametrize("name", ["plain", "passphrase, AES-256, as libvirt"])
def test_pcrs_go_on_when_volatile_state_is_imported(directory: Path, name: str) -> None:
    case = CASES[name]
    platform = made(directory, case)
    with platform:
        assert c.code_of(platform.run(c.pcr_extend(5, DIGEST))[0]) == 0
        platform.store_volatile()
    state = read_state(platform.state_dir, case.key)
    assert set(state.states) == {StateKind.PERMANENT, StateKind.VOLATILE}
    (pcr,) = in_process(ask, TpmVersion.V2_0, state.states, c.pcr_read(5))
    assert c.pcr_value(pcr) == hashlib.sha256(bytes(32) + DIGEST).digest()


def test_cause_is_named_when_key_of_real_state_is_missing_wrong_or_not_needed(directory: Path) -> None:
    case = CASES["passphrase, AES-256, as libvirt"]
    platform = made(directory, case)
    with pytest.raises(UsageError, match="Give the key"):
        read_state(platform.state_dir)
    for wrong in (SwtpmKey.from_passphrase(b"s3cret\n"), SwtpmKey.from_passphrase(b"s3cret", Kdf.SHA512)):
        with pytest.raises(StateError, match="the key is wrong"):
            read_state(platform.state_dir, wrong)
    (directory / "other").mkdir()
    plain = made(directory / "other", CASES["plain"])
    with pytest.raises(StateError, match="is not encrypted"):
        read_state(plain.state_dir, case.key)


def test_refused_when_any_byte_of_real_encrypted_state_is_flipped(directory: Path) -> None:
    case = CASES["key file, AES-256"]
    content = (made(directory, case).state_dir / "tpm2-00.permall").read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 0x80
        with pytest.raises((StateError, UsageError)):
            open_blob("tpm2-00.permall", bytes(changed), case.key)


OLD = {
    "headless": (CASES["plain"], lambda state: swtpm_files.headless(state)),
    "headless, AES-128": (
        CASES["key file, AES-128"],
        lambda state: swtpm_files.headless(state, b"\x0f" * 16),
    ),
    "no initialisation vector": (
        CASES["key file, AES-128"],
        lambda state: swtpm_files.encrypted(state, b"\x0f" * 16),
    ),
    "as today, written by the tests": (
        CASES["key file, AES-256"],
        lambda state: swtpm_files.encrypted(state, b"\x5a" * 32, os.urandom(32)),
    ),
}


@pytest.mark.parametrize(("case", "write"), OLD.values(), ids=OLD.keys())
def test_swtpm_and_import_read_the_same_when_file_is_in_an_older_form(
    directory: Path, case: Case, write: Callable[[bytes], bytes]
) -> None:
    """swtpm 0.7 still reads what was written before 0.1, so it is the judge of what the tests write."""
    platform = made(directory, case)
    state = read_state(platform.state_dir, case.key)
    (platform.state_dir / "tpm2-00.permall").write_bytes(write(state.states[StateKind.PERMANENT]))
    assert read_state(platform.state_dir, case.key) == SwtpmState(TpmVersion.V2_0, state.states)
    with platform:
        (ek,) = platform.run(EK_20)
    assert c.code_of(ek) == 0
    assert in_process(ask, TpmVersion.V2_0, state.states, c.startup(), EK_20)[1] == ek
