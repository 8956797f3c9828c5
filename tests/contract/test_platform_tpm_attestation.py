"""What every platform TPM must do for its identity: the same keys, quotes that verify, credentials for itself alone."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tpm2_pytss import TPM2B_NAME, TPM2B_PUBLIC, TPMT_PUBLIC
from tpm2_pytss.utils import make_credential as make_by_tss

from tests.contract.conftest import Tpm
from tests.support.processes import short_directory
from vtpm.errors import AttestationError, UsageError
from vtpm.measurement.record import event_digest
from vtpm.migration.certificates import PlatformKind, certify, new_authority
from vtpm.migration.policy import PlatformPolicy
from vtpm.migration.verifier import verify_evidence
from vtpm.platform_tpm.pcrs import DEFAULT_PCRS, PcrBank, PcrSelection
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.tpm.attest import MAX_EXTRA_BYTES, read_quote, read_signing_key, verify_signature
from vtpm.tpm.credential import make_credential, read_endorsement_key
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.tpm.launch_log import LaunchLog
from vtpm.tpm.launch_log import encode as encode_log
from vtpm.wire.evidence import Evidence, decode_evidence, encode_evidence

pytestmark = pytest.mark.timeout(60)
NONCE = bytes(range(32))
SECRET = bytes(range(100, 132))
_TOOLS_HEAD = bytes.fromhex("badcc0de00000001")


def credential_for(endorsement: bytes, name: bytes, secret: bytes = SECRET) -> tuple[bytes, bytes]:
    """What TPM2_MakeCredential gives, made by tpm2-pytss in software."""
    area, _ = TPMT_PUBLIC.unmarshal(endorsement)
    sealed, encrypted = make_by_tss(TPM2B_PUBLIC(publicArea=area), secret, TPM2B_NAME(name))
    return bytes(sealed), bytes(encrypted)


def test_keys_are_the_same_when_asked_again_and_after_a_clear(tpm: Tpm, platform: PlatformTpm) -> None:
    first = platform.identity()
    assert platform.identity() == first
    key = read_signing_key(first.attestation)
    key.require_attestation_key()
    platform.close()
    subprocess.run(["tpm2_clear", "-T", tpm.tcti], check=True, capture_output=True, timeout=20)
    with PlatformTpm(tpm.tcti) as again:
        assert again.identity() == first


def test_keys_are_others_when_the_tpm_is_another(kind: type[Tpm], platform: PlatformTpm) -> None:
    with short_directory() as folder, kind(folder) as other, PlatformTpm(other.tcti) as stranger:
        mine, theirs = platform.identity(), stranger.identity()
        assert mine.attestation != theirs.attestation and mine.endorsement != theirs.endorsement


def test_quote_verifies_when_read_back(platform: PlatformTpm) -> None:
    platform.extend(4, PcrBank.SHA256, b"k" * 32)
    key = read_signing_key(platform.identity().attestation)
    signed = platform.quote(DEFAULT_PCRS, NONCE)
    verify_signature(key, signed.attest, signed.signature)
    quote = read_quote(signed.attest)
    assert quote.extra == NONCE and quote.reset_count == platform.reset_count()
    values = platform.pcr_values(DEFAULT_PCRS)
    quote.require_values(HashAlgorithm.SHA256, values)
    with pytest.raises(AttestationError, match="not those that were quoted"):
        quote.require_values(HashAlgorithm.SHA256, values | {4: bytes(32)})
    with pytest.raises(AttestationError, match="the quote is over sha256:0,2,4,7, wanted is sha256:0,2,4"):
        quote.require_values(HashAlgorithm.SHA256, {index: values[index] for index in (0, 2, 4)})


def test_quote_verifies_by_tpm2_tools_too(platform: PlatformTpm, directory: Path) -> None:
    signed = platform.quote(PcrSelection.parse("sha384:7"), NONCE)
    key = read_signing_key(platform.identity().attestation)
    places = {name: directory / name for name in ("key.pem", "attest", "signature")}
    places["key.pem"].write_bytes(key.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    places["attest"].write_bytes(signed.attest)
    places["signature"].write_bytes(signed.signature)
    command = ["tpm2_checkquote", "-u", "key.pem", "-m", "attest", "-s", "signature", "-g", "sha256"]
    for nonce, accepted in ((NONCE, True), (bytes(32), False)):
        done = subprocess.run([*command, "-q", nonce.hex()], cwd=directory, capture_output=True, timeout=20)
        assert (done.returncode == 0) is accepted, done.stderr


def test_quote_is_refused_when_there_is_too_much_to_sign(platform: PlatformTpm) -> None:
    with pytest.raises(UsageError, match="65 bytes of qualifying data"):
        platform.quote(DEFAULT_PCRS, bytes(MAX_EXTRA_BYTES + 1))


def test_secret_comes_out_when_the_credential_is_for_both_keys(platform: PlatformTpm) -> None:
    mine = platform.identity()
    name = read_signing_key(mine.attestation).name
    assert platform.activate(*credential_for(mine.endorsement, name)).reveal() == SECRET


def test_secret_comes_out_when_vtpm_has_made_the_credential(platform: PlatformTpm) -> None:
    mine = platform.identity()
    name = read_signing_key(mine.attestation).name
    endorsement = read_endorsement_key(mine.endorsement)
    made = make_credential(endorsement, name, SECRET)
    assert platform.activate(made.credential, made.encrypted_secret).reveal() == SECRET
    other = make_credential(endorsement, name[:-1] + bytes([name[-1] ^ 1]), SECRET)
    with pytest.raises(AttestationError, match="for another platform or another key"):
        platform.activate(other.credential, other.encrypted_secret)


def test_credential_is_that_of_tpm2_tools_both_ways(tpm: Tpm, platform: PlatformTpm, directory: Path) -> None:
    def tool(*words: str) -> None:
        done = subprocess.run([words[0], "-T", tpm.tcti, *words[1:]], cwd=directory, capture_output=True, timeout=20)
        assert done.returncode == 0, (words, done.stderr)

    mine = platform.identity()
    name = read_signing_key(mine.attestation).name
    endorsement = read_endorsement_key(mine.endorsement)
    (directory / "secret").write_bytes(SECRET)
    (directory / "ek").write_bytes(len(mine.endorsement).to_bytes(2, "big") + mine.endorsement)
    platform.close()
    tool("tpm2_makecredential", "-u", "ek", "-s", "secret", "-n", name.hex(), "-o", "theirs")
    sealed, encrypted = _of_tools((directory / "theirs").read_bytes())
    with PlatformTpm(tpm.tcti) as again:
        assert again.activate(sealed, encrypted).reveal() == SECRET
    tool("tpm2_createek", "-G", "ecc", "-c", "ek.ctx", "-u", "ek.pub")
    assert (directory / "ek.pub").read_bytes() == (directory / "ek").read_bytes()
    tool("tpm2_flushcontext", "-t")
    tool("tpm2_createak", "-C", "ek.ctx", "-c", "ak.ctx", "-G", "ecc", "-g", "sha256", "-s", "ecdsa", "-n", "ak.name")
    tool("tpm2_flushcontext", "-t")
    made = make_credential(endorsement, (directory / "ak.name").read_bytes(), SECRET)
    parts = (len(part).to_bytes(2, "big") + part for part in (made.credential, made.encrypted_secret))
    (directory / "ours").write_bytes(_TOOLS_HEAD + b"".join(parts))
    tool("tpm2_startauthsession", "--policy-session", "-S", "session")
    tool("tpm2_policysecret", "-S", "session", "-c", "e")
    activate = ("-c", "ak.ctx", "-C", "ek.ctx", "-P", "session:session", "-i", "ours", "-o", "opened")
    tool("tpm2_activatecredential", *activate)
    assert (directory / "opened").read_bytes() == SECRET


def _of_tools(data: bytes) -> tuple[bytes, bytes]:
    """The two parts of a credential as tpm2-tools write it."""
    assert data.startswith(_TOOLS_HEAD)
    rest, parts = data[len(_TOOLS_HEAD) :], []
    while rest:
        size = 2 + int.from_bytes(rest[:2], "big")
        parts.append(rest[2:size])
        rest = rest[size:]
    sealed, encrypted = parts
    return sealed, encrypted


def test_secret_stays_in_when_the_credential_is_for_another_key_or_platform(
    kind: type[Tpm], platform: PlatformTpm
) -> None:
    mine = platform.identity()
    with short_directory() as folder, kind(folder) as other, PlatformTpm(other.tcti) as stranger:
        theirs = stranger.identity()
    name, their_name = (read_signing_key(one.attestation).name for one in (mine, theirs))
    for endorsement, of in ((mine.endorsement, their_name), (theirs.endorsement, name)):
        with pytest.raises(AttestationError, match="for another platform or another key"):
            platform.activate(*credential_for(endorsement, of))


def test_credential_is_refused_when_it_is_damaged(platform: PlatformTpm) -> None:
    mine = platform.identity()
    sealed, encrypted = credential_for(mine.endorsement, read_signing_key(mine.attestation).name)
    flipped = sealed[:-1] + bytes([sealed[-1] ^ 1])
    for bad in ((flipped, encrypted), (sealed, encrypted[:-1] + bytes([encrypted[-1] ^ 1])), (b"", b"")):
        with pytest.raises(AttestationError):
            platform.activate(*bad)
    with pytest.raises(AttestationError, match="longer than any"):
        platform.activate(os.urandom(3000), encrypted)
    # Nothing is left behind that would be in the way of the next.
    assert platform.activate(sealed, encrypted).reveal() == SECRET


def test_evidence_of_a_real_platform_is_taken_and_its_replay_is_not(platform: PlatformTpm) -> None:
    services, log = (b"\x11" * 32,), LaunchLog(HashAlgorithm.SHA256, 12, platform.reset_count(), bytes(32))
    platform.extend(0, PcrBank.SHA256, b"f" * 32)
    platform.extend(13, PcrBank.SHA256, event_digest("sha256", services[0].hex()))
    selection = PcrSelection.parse("sha256:0,12,13")
    pcrs = platform.pcr_values(selection)
    policy = PlatformPolicy(
        HashAlgorithm.SHA256, True, {0: frozenset({pcrs[0]})}, 13, frozenset(services), 12, {"qemu": frozenset()}
    )
    now, authority_key = datetime.now(UTC), ec.generate_private_key(ec.SECP256R1())
    authority = new_authority("enrolment", authority_key, now)
    public = platform.identity().attestation
    key = read_signing_key(public)
    certificate = certify(authority, authority_key, "host-b", PlatformKind.EMBEDDED, key, now)
    signed = platform.quote(selection, NONCE)
    shown = Evidence(
        attestation_key=public,
        certificate=certificate.public_bytes(Encoding.DER),
        attest=signed.attest,
        signature=signed.signature,
        bank=HashAlgorithm.SHA256,
        pcrs=pcrs,
        services=services,
        launch_log=encode_log(log),
    )
    shown = decode_evidence(encode_evidence(shown))
    assert verify_evidence(shown, NONCE, policy, [authority], now).name == "host-b"
    with pytest.raises(AttestationError, match="a replay"):
        verify_evidence(shown, bytes(32), policy, [authority], now)
