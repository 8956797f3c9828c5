"""Only an endorsement key of TCG's template is encrypted to, and what comes out is what Part 1 says."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES

from tests.unit.tpm.ek_examples import ALGORITHMS, ATTRIBUTES, EK, POLICY, endorsement_area
from vtpm.errors import AttestationError, UsageError
from vtpm.tpm.credential import MAX_SECRET_BYTES, Credential, make_credential, read_endorsement_key

NAME = b"\x00\x0b" + bytes(range(32))
SECRET = bytes(range(100, 132))


def kdfa(key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """Written out as Part 1, 11.4.10.2 has it, for one block."""
    message = (1).to_bytes(4, "big") + label + b"\0" + context + bits.to_bytes(4, "big")
    return hmac.digest(key, message, "sha256")[: bits // 8]


def opened(made: Credential, name: bytes) -> bytes:
    """What the TPM does that holds EK. Raises AssertionError: it is bound to another name."""
    point = made.encrypted_secret
    assert (point[:2], point[34:36], len(point)) == (b"\0\x20", b"\0\x20", 68)
    x, y = point[2:34], point[36:]
    numbers = ec.EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), ec.SECP256R1())
    shared = EK.exchange(ec.ECDH(), numbers.public_key())
    mine = EK.public_key().public_numbers().x.to_bytes(32, "big")
    seed = hashlib.sha256((1).to_bytes(4, "big") + shared + b"IDENTITY\0" + x + mine).digest()
    assert made.credential[:2] == b"\0\x20"
    integrity, encrypted = made.credential[2:34], made.credential[34:]
    assert hmac.digest(kdfa(seed, b"INTEGRITY", b"", 256), encrypted + name, "sha256") == integrity
    decryptor = Cipher(AES(kdfa(seed, b"STORAGE", name, 128)), CFB(bytes(16))).decryptor()
    plain = decryptor.update(encrypted) + decryptor.finalize()
    assert int.from_bytes(plain[:2], "big") == len(plain) - 2
    return plain[2:]


@pytest.mark.parametrize("size", [1, 16, MAX_SECRET_BYTES])
def test_secret_comes_out_when_key_and_name_are_those(size: int) -> None:
    key = read_endorsement_key(endorsement_area())
    assert key.fingerprint == hashlib.sha256(endorsement_area()).hexdigest()
    made, again = (make_credential(key, NAME, SECRET[:size]) for _ in range(2))
    assert opened(made, NAME) == SECRET[:size]
    assert made.encrypted_secret != again.encrypted_secret
    with pytest.raises(AssertionError):
        opened(made, NAME[:-1] + b"\0")


@pytest.mark.parametrize("size", [0, MAX_SECRET_BYTES + 1])
def test_secret_is_refused_when_no_credential_holds_it(size: int) -> None:
    with pytest.raises(UsageError, match=f"not {size}"):
        make_credential(read_endorsement_key(endorsement_area()), NAME, bytes(size))


@pytest.mark.parametrize(
    ("area", "why"),
    [
        (endorsement_area(algorithms=(0x0001, *ALGORITHMS[1:])), "the type"),
        (endorsement_area(algorithms=(0x0023, 0x000C, *ALGORITHMS[2:])), "the name algorithm"),
        (endorsement_area(algorithms=(*ALGORITHMS[:2], 0x0026, *ALGORITHMS[3:])), "the symmetric algorithm"),
        (endorsement_area(algorithms=(*ALGORITHMS[:3], 256, *ALGORITHMS[4:])), "symmetric key's size"),
        (endorsement_area(algorithms=(*ALGORITHMS[:4], 0x0042, *ALGORITHMS[5:])), "symmetric mode"),
        (endorsement_area(algorithms=(*ALGORITHMS[:5], 0x0018, *ALGORITHMS[6:])), "the scheme"),
        (endorsement_area(algorithms=(*ALGORITHMS[:6], 0x0004, *ALGORITHMS[7:])), "the curve"),
        (endorsement_area(algorithms=(*ALGORITHMS[:7], 0x0020)), "the key derivation"),
        (endorsement_area(attributes=ATTRIBUTES & ~0x2), "the attributes"),
        (endorsement_area(attributes=ATTRIBUTES | 0x40), "the attributes"),
        (endorsement_area(attributes=ATTRIBUTES & ~0x10000), "the attributes"),
        (endorsement_area(policy=bytes(32)), "another policy"),
        (endorsement_area(policy=b""), "another policy"),
        (endorsement_area(policy=POLICY + b"\0"), "33 bytes"),
        (endorsement_area(point=(1, 1)), "no point of its curve"),
        (endorsement_area() + b"\0", "1 bytes too many"),
        (endorsement_area()[:-1], "cut off"),
        (b"", "cut off"),
        (bytes(2049), "at most 2048 go"),
    ],
)
def test_key_is_refused_when_it_is_not_of_the_template(area: bytes, why: str) -> None:
    with pytest.raises(AttestationError, match=why):
        read_endorsement_key(area)
