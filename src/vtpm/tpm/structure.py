"""Reads what a TPM has marshalled: big-endian numbers and sized buffers, bounded, to the end. Pure; for vtpm.tpm.

Spec: TPM 2.0 Part 1 (revision 1.59), 9 (structures on the wire).
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ec

from vtpm.errors import AttestationError

MAX_STRUCTURE_BYTES = 2048
P256_BYTES = 32
"""Of one coordinate."""


class Reader:
    """Reads one structure from its beginning to its end.

    Args:
        what: it is, for errors.
        data: untrusted.
    Raises:
        AttestationError: it is too long.
    """

    def __init__(self, what: str, data: bytes) -> None:
        if len(data) > MAX_STRUCTURE_BYTES:
            raise AttestationError(f"{what} has {len(data)} bytes, at most {MAX_STRUCTURE_BYTES} go")
        self._what = what
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        """Return so many bytes. Raises AttestationError: there are not so many."""
        if len(self._data) - self._at < size:
            raise AttestationError(f"{self._what} is cut off")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, size: int) -> int:
        """Return a number of so many bytes. Raises as take."""
        return int.from_bytes(self.take(size), "big")

    def sized(self, most: int) -> bytes:
        """Return a TPM2B's content. Raises AttestationError: it has more bytes than `most`, or is cut off."""
        size = self.number(2)
        if size > most:
            raise AttestationError(f"{self._what} has a field of {size} bytes, at most {most} go")
        return self.take(size)

    def expect(self, size: int, value: int, noun: str) -> None:
        """Read a number of so many bytes. Raises AttestationError: it is another than `value`."""
        found = self.number(size)
        if found != value:
            raise AttestationError(f"{self._what} has {noun} 0x{found:x}, wanted is 0x{value:x}")

    def p256_point(self, refused: str) -> ec.EllipticCurvePublicKey:
        """Read a TPMS_ECC_POINT, which ends the structure.

        Raises:
            AttestationError: with `refused`, it is no point of NIST P-256; or as sized and end.
        """
        x, y = (int.from_bytes(self.sized(P256_BYTES), "big") for _ in range(2))
        self.end()
        try:
            return ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
        except ValueError:
            raise AttestationError(refused) from None

    def end(self) -> None:
        """Raises AttestationError: there is more."""
        if self._at != len(self._data):
            raise AttestationError(f"{self._what} has {len(self._data) - self._at} bytes too many")
