"""The root record: one value that stands for a store's whole content; docs/state-format.md, "Root record".

Its digest, with its version, is what the platform TPM keeps as the anchor. Pure: bytes in, values out, and the rule by
which a store is accepted. Imported by the stores, the committer and, for AnchorValue, the manager.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
from functools import cached_property
from uuid import UUID

from vtpm.errors import StateError
from vtpm.secret import Secret
from vtpm.vault.records import DIGEST_BYTES, MAX_COUNTER

MAGIC = b"VTPMROOT"
FORMAT_VERSION = 1
KEY_ID_BYTES = 16

_BODY = struct.Struct(">8sHHI16s16sQ32sQ32sQ32sQ32s")
RECORD_BYTES = _BODY.size + DIGEST_BYTES
_DIGEST_LABEL = b"vtpm root digest v1"
_MAC_LABEL = b"vtpm root mac v1"
_KEY_LABEL = b"vtpm root key id v1"
_ACCEPT = "Nothing was changed; keep the files as evidence. Put the newest store back, or let an operator accept this"


@dataclass(frozen=True)
class AnchorValue:
    """What the platform TPM keeps: of which version the store is, and which one of that version.

    Args:
        version: 0 to MAX_COUNTER; 0 before anything was anchored.
        digest: DIGEST_BYTES.
    """

    version: int
    digest: bytes

    def __str__(self) -> str:
        return f"version {self.version} ({self.digest.hex()[:16]})"


NOTHING_ANCHORED = AnchorValue(0, bytes(DIGEST_BYTES))


@dataclass(frozen=True)
class RootRecord:
    """What one version of a store contains, and from which anchored value it descends.

    Args:
        store_id: drawn when the store was made.
        key_id: which MAC key the record is under; see key_id_of.
        version: counts up with each transaction that changed anything; from 1.
        tree: root of the tree over all vTPMs.
        events, events_head: id of the last audit event, and the hash over all of them.
        base: the last value known to be anchored when this version was written.
        attempted: a later value whose anchoring had begun by then and may have come to pass; otherwise as `base`.
    """

    store_id: UUID
    key_id: bytes
    version: int
    tree: bytes
    events: int
    events_head: bytes
    base: AnchorValue
    attempted: AnchorValue

    @cached_property
    def value(self) -> AnchorValue:
        """What stands for this record in the platform TPM."""
        return AnchorValue(self.version, hashlib.sha256(_DIGEST_LABEL + self._body()).digest())

    def encode(self, mac_key: Secret) -> bytes:
        """Return the RECORD_BYTES bytes that are stored."""
        body = self._body()
        return body + _mac(mac_key, _MAC_LABEL, body)

    def _body(self) -> bytes:
        return _BODY.pack(
            MAGIC,
            FORMAT_VERSION,
            RECORD_BYTES,
            0,
            self.store_id.bytes,
            self.key_id,
            self.version,
            self.tree,
            self.events,
            self.events_head,
            self.base.version,
            self.base.digest,
            self.attempted.version,
            self.attempted.digest,
        )


def key_id_of(mac_key: Secret) -> bytes:
    """Return the KEY_ID_BYTES by which a record names its MAC key, and which tell nothing of it."""
    return _mac(mac_key, _KEY_LABEL, b"")[:KEY_ID_BYTES]


def decode(name: str, blob: bytes, mac_key: Secret) -> RootRecord:
    """Verify a stored root record and return it.

    The fields are looked at first, only so that a refusal can say what is wrong.

    Args:
        name: of the store, for messages.
    Raises:
        StateError: damaged, of an unknown format, foreign (of another MAC key) or edited.
    """
    if len(blob) != RECORD_BYTES:
        raise _refused(name, f"its root record is damaged: {len(blob)} bytes, not {RECORD_BYTES}")
    body, mac = blob[: _BODY.size], blob[_BODY.size :]
    magic, format_version, length, reserved, store_id, key_id, version, tree, events, head, *ancestors = _BODY.unpack(
        body
    )
    if magic != MAGIC:
        raise _refused(name, "its root record is damaged: none begins like this")
    if format_version != FORMAT_VERSION:
        raise StateError(
            f"{name} has a root record of format version {format_version}; this program reads {FORMAT_VERSION}",
            next_step="Use the program that wrote it; nothing was changed.",
        )
    if key_id != key_id_of(mac_key):
        raise _refused(name, "it is foreign: its root record is under the key of another root")
    if not hmac.compare_digest(mac, _mac(mac_key, _MAC_LABEL, body)):
        raise _refused(name, "it was edited: its root record was not written by a holder of the root key")
    base, attempted = AnchorValue(*ancestors[:2]), AnchorValue(*ancestors[2:])
    if length != RECORD_BYTES or reserved or not 1 <= version <= MAX_COUNTER or events > MAX_COUNTER:
        raise _refused(name, "its root record is damaged: a field is out of bounds")
    return RootRecord(UUID(bytes=store_id), key_id, version, tree, events, head, base, attempted)


def check_descends(name: str, record: RootRecord, anchor: AnchorValue) -> None:
    """Return when the store is the anchored one or goes on from it.

    In the latter case its last transactions were not anchored before the manager ended. They may have been answered,
    so they count, and are anchored before anything else is done.

    Args:
        anchor: what the platform TPM has.
    Raises:
        StateError: older than the anchor, or forked: of the same age or later, and with another past.
    """
    value = record.value
    if value == anchor or (value.version > anchor.version and anchor in (record.base, record.attempted)):
        return
    if value.version < anchor.version:
        raise _refused(name, f"it is older than the anchor: {value}, and the platform TPM has {anchor}")
    raise _refused(name, f"it is forked: {value} descends from {record.attempted}, and the platform TPM has {anchor}")


def missing(name: str, anchor: AnchorValue) -> StateError:
    """Return the error for a store that is not there although one was anchored."""
    return _refused(name, f"it is missing, and the platform TPM has {anchor} of it")


def edited(name: str, what: str) -> StateError:
    """Return the error for content that is not what the root record stands for."""
    return _refused(name, f"it was edited: {what}")


def _refused(name: str, cause: str) -> StateError:
    return StateError(f"{name} is refused: {cause}", next_step=_ACCEPT)


def _mac(mac_key: Secret, label: bytes, data: bytes) -> bytes:
    return hmac.digest(mac_key.reveal(), label + data, "sha256")
