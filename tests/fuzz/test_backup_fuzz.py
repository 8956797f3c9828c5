"""Backup files, escrows and recovery keys come back as they were written; whatever else is read is refused cleanly."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import spoiled
from vtpm.errors import StateError, UsageError
from vtpm.recovery_key import RecoveryKey, RecoveryPublicKey, recipient
from vtpm.secret import Secret
from vtpm.tpm.types import StateKind, TpmVersion, VtpmId
from vtpm.vault import backup as backup_module
from vtpm.vault.backup import Backup, open_, seal, sealed_to
from vtpm.vault.passphrase import MIN_LOG2_N, Passphrase, ScryptCost

KEY = RecoveryKey.generate()
WORDS = Passphrase("correct horse battery")
_counter = st.integers(1, 2**63 - 1)
_id = st.integers(0, 2**32 - 2)
_blob = st.binary(min_size=1, max_size=300)
backups = st.builds(
    Backup,
    vtpm_id=st.uuids().map(VtpmId),
    name=st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,30}(\.[A-Za-z0-9_-]{1,31})?)?", fullmatch=True),
    owner_uid=_id,
    owner_gid=_id,
    vm_uuid=st.none() | st.uuids(),
    tpm_version=st.sampled_from(TpmVersion),
    epoch=_counter,
    state_version=_counter,
    engine_version=st.integers(0, 2**32 - 1),
    exported_at=st.datetimes(min_value=datetime(1970, 1, 1), timezones=st.just(UTC)),
    states=st.fixed_dictionaries(
        {StateKind.PERMANENT: _blob}, optional={StateKind.VOLATILE: _blob, StateKind.SAVESTATE: _blob}
    ),
)
files = backups.map(lambda backup: seal(backup, KEY.public))
cheap_files = backups.map(lambda backup: seal(backup, WORDS, ScryptCost(MIN_LOG2_N)))
bodies = backups.map(backup_module.encode)


@effort.codec
@given(backups)
def test_backup_comes_back_when_sealed(backup: Backup) -> None:
    assert open_(seal(backup, KEY.public), KEY) == backup


@effort.codec
@given(backups, st.data())
def test_only_the_same_comes_out_when_file_is_spoiled(backup: Backup, data: st.DataObject) -> None:
    spoilt = data.draw(spoiled(st.just(seal(backup, KEY.public))))
    # Spoiled back to what it was, or not at all.
    with suppress(StateError, UsageError):
        assert open_(spoilt, KEY) == backup


@effort.codec
@given(spoiled(files) | spoiled(cheap_files) | st.binary(max_size=300))
def test_question_what_opens_it_is_answered_or_refused_when_file_is_anything(data: bytes) -> None:
    with suppress(StateError):
        fingerprint = sealed_to(data)
        assert fingerprint is None or len(fingerprint) == len(KEY.public.fingerprint)


@effort.codec
@given(spoiled(bodies) | st.binary(max_size=300))
def test_content_is_refused_or_canonical_when_somebody_sealed_what_he_likes(body: bytes) -> None:
    """Past all cryptography: whoever knows the public key reaches this parser."""
    try:
        backup = backup_module.decode(body)
        again = backup_module.encode(backup)
    except StateError:
        return
    assert backup.exported_at - datetime(1970, 1, 1, tzinfo=UTC) >= timedelta()
    assert len(again) <= len(body) + len(StateKind) * 5


@effort.codec
@given(st.binary(min_size=32, max_size=32), spoiled(st.just(KEY.public.seal(Secret(bytes(32)), "p", b"c"))))
def test_escrow_opens_unspoiled_and_is_refused_cleanly_when_spoiled(secret: bytes, data: bytes) -> None:
    assert KEY.open(KEY.public.seal(Secret(secret), "p", b"c"), "p", b"c").reveal() == secret
    with suppress(StateError):
        assert len(recipient(data)) == len(KEY.public.fingerprint)
        assert KEY.open(data, "p", b"c").reveal() == bytes(32)


@effort.codec
@given(st.data())
def test_recovery_key_is_read_right_or_refused_when_its_text_is_spoiled(data: st.DataObject) -> None:
    text = KEY.to_text()
    spoilt = data.draw(spoiled(st.just(text.encode()))).decode("latin-1")
    try:
        key = RecoveryKey.from_text(spoilt)
    except UsageError:
        return
    assert key.public == KEY.public


@effort.codec
@given(st.text(max_size=200))
def test_text_is_refused_when_it_is_anything(text: str) -> None:
    with pytest.raises(UsageError):
        RecoveryKey.from_text(text)


@effort.codec
@given(st.binary(min_size=30, max_size=34), st.text(max_size=200))
def test_public_recovery_key_is_what_was_read_or_refused(raw: bytes, text: str) -> None:
    with suppress(UsageError):
        key = RecoveryPublicKey(raw)
        assert key.raw == raw
        assert RecoveryPublicKey.from_text(key.to_text().lower().replace("-", " ")) == key
    with suppress(UsageError):
        RecoveryPublicKey.from_text(text)
