"""The sealed root key as it is kept on disk: SealedBlob and its one text form. Pure; for platform_tpm and keeper.

The form is canonical JSON (keys sorted, no spaces, ASCII) and one newline:

    format       "vtpm-sealed"
    version      1
    parent_name  hex; TPM Name of the storage primary key that it is sealed under: tells one TPM from another
    pcrs         selection as `sha256:0,2,4,7`
    pcr_values   list of hex, the value of each of these PCRs at sealing; its digest is the policy in `public`
    public       hex; TPMT_PUBLIC of the sealed object
    private      hex; TPM2B_PRIVATE's buffer, encrypted and authenticated by the TPM over the object's Name

Nothing in it is secret and nothing in it is trusted. The reader takes the canonical form only. Every field is bound:
pcrs and pcr_values to the policy in `public`, `public` to `private` by the TPM, `parent_name` by the TPM's own key.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from vtpm.errors import StateError, UsageError
from vtpm.platform_tpm.pcrs import PcrSelection, pcr_policy_digest

FORMAT = "vtpm-sealed"
VERSION = 1
MAX_BLOB_BYTES = 16 * 1024
_MAX_FIELD_BYTES = 1024
_KEYS = {"format", "version", "parent_name", "pcrs", "pcr_values", "public", "private"}


@dataclass(frozen=True)
class SealedBlob:
    """A secret sealed by one TPM under the values of some PCRs.

    Args:
        parent_name: TPM Name of the storage primary key.
        selection, pcr_values: the PCRs and their values at sealing.
        public: TPMT_PUBLIC, marshalled.
        private: TPM2B_PRIVATE's buffer.
    """

    parent_name: bytes
    selection: PcrSelection
    pcr_values: tuple[bytes, ...]
    public: bytes = field(repr=False)
    private: bytes = field(repr=False)

    @property
    def policy_digest(self) -> bytes:
        """The policy under which it opens."""
        return pcr_policy_digest(self.selection, dict(zip(self.selection.indexes, self.pcr_values, strict=True)))

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "parent_name": self.parent_name.hex(),
            "pcrs": str(self.selection),
            "pcr_values": [value.hex() for value in self.pcr_values],
            "public": self.public.hex(),
            "private": self.private.hex(),
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> SealedBlob:
        """Read the canonical form.

        Raises:
            StateError: anything else.
        """
        if len(data) > MAX_BLOB_BYTES:
            raise _damaged(f"it has more than {MAX_BLOB_BYTES} bytes")
        try:
            fields = json.loads(data.decode("ascii"))
        except (ValueError, RecursionError):
            raise _damaged("it is not JSON") from None
        if type(fields) is not dict or fields.keys() != _KEYS:
            raise _damaged("it lacks a field or has one too many")
        if fields["format"] != FORMAT:
            raise _damaged("it is of another format")
        if fields["version"] != VERSION:
            raise StateError(f"the sealed key is of another version than {VERSION}", next_step="Use the newer vtpm")
        blob = cls._from_fields(fields)
        # JSON has many spellings of one thing; only one is written, so any other is not ours.
        if blob.to_bytes() != data:
            raise _damaged("it is not in its canonical form")
        return blob

    @classmethod
    def _from_fields(cls, fields: dict[str, object]) -> SealedBlob:
        text, values = fields["pcrs"], fields["pcr_values"]
        if type(text) is not str or type(values) is not list:
            raise _damaged("a field is of another type")
        try:
            selection = PcrSelection.parse(text)
        except UsageError as error:
            raise _damaged(error.message) from None
        pcr_values = tuple(_hex(value) for value in values)
        if [len(value) for value in pcr_values] != [selection.bank.digest_bytes] * len(selection.indexes):
            raise _damaged("its PCR values do not fit its selection")
        return cls(_hex(fields["parent_name"]), selection, pcr_values, _hex(fields["public"]), _hex(fields["private"]))


def _hex(value: object) -> bytes:
    if type(value) is not str or not 0 < len(value) <= 2 * _MAX_FIELD_BYTES:
        raise _damaged("a field is empty, too long or of another type")
    try:
        return bytes.fromhex(value)
    except ValueError:
        raise _damaged("a field is not hexadecimal") from None


def _damaged(why: str) -> StateError:
    return StateError(f"the sealed key is damaged: {why}", next_step="Put back the root file from a backup")
