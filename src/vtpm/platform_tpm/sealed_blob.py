"""The sealed root key as it is kept on disk: SealedBlob and its one text form. Pure; for platform_tpm and keeper.

The form is canonical JSON (keys sorted, no spaces, ASCII) and one newline:

    format        "vtpm-sealed"
    version       2
    srk_name      hex; TPM Name of the storage primary key that it is sealed under
    ek_name       hex; TPM Name of the endorsement key: with srk_name tells a cleared TPM from another one
    policy_index  {"handle": number, "name": hex}; NV index that says which policy is approved
    anchor_index  {"handle": number, "name": hex}; NV index that says which saved state is current
    lists         1 or 2 lists of 1 to 8 sets {"label": text, "pcrs": `sha256:0,2,4,7`, "values": list of hex}
    public        hex; TPMT_PUBLIC of the sealed object
    private       hex; TPM2B_PRIVATE's buffer, encrypted and authenticated by the TPM over the object's Name
    mac           hex; HMAC-SHA256 of this form without mac; key: HKDF-Expand of the root key, `vtpm root file mac`

Of two lists the second is on its way into the policy index: the file is written with both, then the index, then the
file with the new one alone. So the file has the list that the index holds, whenever the power goes.

Nothing in it is secret and nothing in it is trusted. The reader takes the canonical form only. Before the key is open
the TPM binds what matters: policy_index by the policy in `public`, `public` to `private`, the lists by the digest in
the index, `srk_name` by its own key. Once it is open, `mac` binds the whole: also the anchor's index, and the labels by
which people drop sets.
"""

from __future__ import annotations

import hmac
import json
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from vtpm.errors import ConflictError, StateError, UsageError
from vtpm.platform_tpm.pcrs import PcrSelection
from vtpm.platform_tpm.root_policy import PcrSet, PcrSets, approved, authorize_nv_digest, checked
from vtpm.secret import KEY_BYTES, Secret

FORMAT = "vtpm-sealed"
VERSION = 2
MAX_BLOB_BYTES = 64 * 1024
"""Two lists of eight sets of 24 PCRs of 48 bytes are 39 KB."""
_MAX_FIELD_BYTES = 1024
_NV_HANDLES = range(0x01000000, 0x02000000)
_MAC_LABEL = b"vtpm root file mac"
_KEYS = {
    *("format", "version", "srk_name", "ek_name", "policy_index", "anchor_index", "lists", "public", "private", "mac")
}


@dataclass(frozen=True)
class IndexRef:
    """An NV index as the root file knows it.

    Args:
        handle: TPM handle, 0x01000000 to 0x01ffffff.
        name: TPM Name of the index once it is written.
    """

    handle: int
    name: bytes


@dataclass(frozen=True)
class Indexes:
    """The NV indexes of a root key, as far as the TPM has them.

    Args:
        srk_name: TPM Name of its storage primary key: other TPMs may have indexes of the same Names.
    """

    policy: IndexRef | None = None
    anchor: IndexRef | None = None
    srk_name: bytes = b""


NO_INDEXES = Indexes()


@dataclass(frozen=True)
class SealedBlob:
    """The root key sealed by one TPM, under a policy that an index of the TPM approves.

    Args:
        srk_name, ek_name: TPM Names of the storage primary key and the endorsement key.
        policy_index, anchor_index: the NV indexes.
        lists: one list of PCR sets, or two different ones; the policy index holds the digest of one of them.
        public: TPMT_PUBLIC, marshalled.
        private: TPM2B_PRIVATE's buffer.
        mac: see `signed`.
    """

    srk_name: bytes
    ek_name: bytes
    policy_index: IndexRef
    anchor_index: IndexRef
    lists: tuple[PcrSets, ...]
    public: bytes = field(repr=False)
    private: bytes = field(repr=False)
    mac: bytes = field(default=b"", repr=False)

    @property
    def policy_digest(self) -> bytes:
        """The policy under which it opens."""
        return authorize_nv_digest(self.policy_index.name)

    def list_of(self, content: bytes) -> PcrSets | None:
        """Return the list that the policy index holds, by the index's content; None when it holds another."""
        return next((sets for sets in self.lists if approved(sets) == content), None)

    def signed(self, root: Secret) -> SealedBlob:
        """Return it with the MAC of its root key."""
        return replace(self, mac=self._mac(root))

    def with_lists(self, root: Secret, *lists: PcrSets) -> SealedBlob:
        """Return it with other lists, and the MAC of its root key."""
        return replace(self, lists=lists).signed(root)

    def verify(self, root: Secret) -> None:
        """Check the MAC.

        Raises:
            StateError: this is not as it was written, or the root key is another.
        """
        if not hmac.compare_digest(self.mac, self._mac(root)):
            raise _damaged("it is not as it was written, or not of this root key")

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        return _canonical(self._fields() | {"mac": self.mac.hex()})

    def _mac(self, root: Secret) -> bytes:
        key = HKDFExpand(SHA256(), KEY_BYTES, _MAC_LABEL).derive(root.reveal())
        return hmac.digest(key, _canonical(self._fields()), "sha256")

    def _fields(self) -> dict[str, object]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "srk_name": self.srk_name.hex(),
            "ek_name": self.ek_name.hex(),
            "policy_index": _index_fields(self.policy_index),
            "anchor_index": _index_fields(self.anchor_index),
            "lists": [[_set_fields(one) for one in sets] for sets in self.lists],
            "public": self.public.hex(),
            "private": self.private.hex(),
        }

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
        if type(fields) is not dict or fields.get("format") != FORMAT:
            raise _damaged("it is of another format")
        version = fields.get("version")
        if type(version) is int and version != VERSION:
            raise StateError(
                f"the sealed key is of version {version}; this vtpm reads version {VERSION} only",
                next_step="Use the vtpm that wrote it",
            )
        if fields.keys() != _KEYS:
            raise _damaged("it lacks a field or has one too many")
        blob = cls._from_fields(fields)
        # JSON has many spellings of one thing; only one is written, so any other is not ours.
        if blob.to_bytes() != data:
            raise _damaged("it is not in its canonical form")
        return blob

    @classmethod
    def _from_fields(cls, fields: dict[str, object]) -> SealedBlob:
        lists = fields["lists"]
        if type(lists) is not list or not 1 <= len(lists) <= 2 or (lists[0] == lists[-1] and len(lists) == 2):
            raise _damaged("it has not one list of PCRs, or two different ones")
        return cls(
            srk_name=_hex(fields["srk_name"]),
            ek_name=_hex(fields["ek_name"]),
            policy_index=_index(fields["policy_index"]),
            anchor_index=_index(fields["anchor_index"]),
            lists=tuple(_sets(sets) for sets in lists),
            public=_hex(fields["public"]),
            private=_hex(fields["private"]),
            mac=_hex(fields["mac"]),
        )


def _canonical(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _index_fields(index: IndexRef) -> dict[str, object]:
    return {"handle": index.handle, "name": index.name.hex()}


def _index(value: object) -> IndexRef:
    if type(value) is not dict or value.keys() != {"handle", "name"}:
        raise _damaged("an NV index lacks a field or has one too many")
    if type(value["handle"]) is not int or value["handle"] not in _NV_HANDLES:
        raise _damaged("it names a handle that is no NV index")
    return IndexRef(value["handle"], _hex(value["name"]))


def _set_fields(one: PcrSet) -> dict[str, object]:
    return {"label": one.label, "pcrs": str(one.selection), "values": [value.hex() for value in one.values]}


def _sets(value: object) -> PcrSets:
    if type(value) is not list:
        raise _damaged("a list of PCRs is of another type")
    try:
        return checked(tuple(_set(one) for one in value))
    except (UsageError, ConflictError) as error:
        raise _damaged(error.message) from None


def _set(value: object) -> PcrSet:
    if type(value) is not dict or value.keys() != {"label", "pcrs", "values"}:
        raise _damaged("a set of PCRs lacks a field or has one too many")
    label, pcrs, values = value["label"], value["pcrs"], value["values"]
    if type(label) is not str or type(pcrs) is not str or type(values) is not list:
        raise _damaged("a field is of another type")
    return PcrSet(label, PcrSelection.parse(pcrs), tuple(_hex(one) for one in values))


def _hex(value: object) -> bytes:
    if type(value) is not str or not 0 < len(value) <= 2 * _MAX_FIELD_BYTES:
        raise _damaged("a field is empty, too long or of another type")
    try:
        return bytes.fromhex(value)
    except ValueError:
        raise _damaged("a field is not hexadecimal") from None


def _damaged(why: str) -> StateError:
    return StateError(f"the sealed key is damaged: {why}", next_step="Put back the root file from a backup")
