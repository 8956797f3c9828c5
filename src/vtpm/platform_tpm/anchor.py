"""The anchor: the value in the platform TPM that says which saved state is current. For platform_tpm and keeper.

The index holds u64 version and 32 bytes of digest, big-endian, written together in one command. Only the write
authority can write it, and each signature serves once; so an older value cannot be put back, and an index that was
defined anew cannot be written at all. No counter stands beside it: decision record 17.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tpm2_pytss import TPM2_SE, TSS2_Exception

from vtpm.errors import ConflictError, PlatformTpmError, StateError, UsageError
from vtpm.platform_tpm import faults, nv_index
from vtpm.platform_tpm.connection import Connection
from vtpm.platform_tpm.nv_index import IndexWriter, NvIndex
from vtpm.platform_tpm.write_authority import WriteAuthority

ANCHOR_BYTES = 40
DIGEST_BYTES = 32
MAX_VERSION = 2**64 - 1
_TITLE = "anchor index"
_POLICY_REF = b"vtpm anchor"


@dataclass(frozen=True)
class Anchor:
    """What the anchor says.

    Args:
        version: 0 to MAX_VERSION; grows with each write.
        digest: DIGEST_BYTES bytes over all that is current.
    Raises:
        UsageError: out of these bounds.
    """

    version: int
    digest: bytes

    def __post_init__(self) -> None:
        if not 0 <= self.version <= MAX_VERSION or len(self.digest) != DIGEST_BYTES:
            raise UsageError(f"an anchor has a version to 2^64-1 and a digest of {DIGEST_BYTES} bytes")

    def to_bytes(self) -> bytes:
        """Return the index's content."""
        return struct.pack(">Q", self.version) + self.digest

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read the index's content, ANCHOR_BYTES bytes."""
        return cls(int.from_bytes(data[:8], "big"), data[8:])


FIRST_ANCHOR = Anchor(0, bytes(DIGEST_BYTES))
"""What the index holds when it was made."""


def anchor_index(handle: int, authority: WriteAuthority) -> NvIndex:
    """Return the anchor index of an authority at a handle."""
    return NvIndex.of(_TITLE, handle, ANCHOR_BYTES, _POLICY_REF, authority)


class AnchorIndex:
    """The anchor index, open for reading and writing; made by PlatformTpm.open_anchor, for one thread at a time.

    What it needs stays loaded in the TPM, so that a write is two commands, or three where it is read first. When the
    TPM has lost it (reset, sleep, another client's flush) or has gone and is back, it is loaded anew, with all checks.

    Args:
        connection: to the TPM.
        index: what it is to be.
        authority: writes it; wiped at `close`.
        srk_name: what the storage primary key's Name is to be.
        known: what the TPM can hold by what an earlier connection saw, the older first; empty: anything.
        shared: whether others of this platform reach the TPM: then it is read before each write, for the key is in
            every copy of the state directory, and no lock of files keeps two of them apart.
    """

    def __init__(
        self,
        connection: Connection,
        index: NvIndex,
        authority: WriteAuthority,
        srk_name: bytes,
        known: tuple[Anchor, ...] = (),
        *,
        shared: bool = True,
    ) -> None:
        self._connection = connection
        self._index = index
        self._authority = authority
        self._srk_name = srk_name
        self._writer: IndexWriter | None = None
        self._generation = -1
        self._handle: Any = None
        self._reader: Any = None
        self._known = known
        self._shared = shared
        self._connection.run("open the anchor", self._establish)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unload what was kept in the TPM and drop the key; the connection stays."""
        try:
            self._connection.run("close the anchor", self._drop)
        except PlatformTpmError:
            self._writer = None  # the TPM is gone, and what it had loaded with it
        self._authority.wipe()

    @property
    def reset_seen(self) -> bool:
        """Whether the TPM was found to have been reset since this was opened (PCRs and sessions lost)."""
        return self._connection.reset_seen

    @property
    def known(self) -> tuple[Anchor, ...]:
        """What the TPM can hold unless others write it: two where a write was not answered, the older first."""
        return self._known

    @property
    def _last(self) -> Anchor:
        return self._known[0] if self._known else FIRST_ANCHOR

    def read(self) -> Anchor:
        """Return what the TPM holds, in an answer that only the TPM can have made.

        Raises:
            PlatformTpmError: the index is missing or was redefined, the TPM is another, failed or went away.
        """
        return self._connection.run("read the anchor", self._read)

    def write(self, anchor: Anchor) -> None:
        """Write a newer anchor; on return the TPM has said, authenticated, that it holds it.

        After an error it may or may not have been written: `read` tells.

        Raises:
            ConflictError: its version is not above the one there; nothing was written.
            PlatformTpmError: as `read`.
        """
        self._connection.run("write the anchor", lambda: self._write(anchor))

    # What follows runs in the connection's thread.

    def _read(self) -> Anchor:
        try:
            self._check()
        except TSS2_Exception as error:
            self._come_back(error)
        return self._last

    def _write(self, anchor: Anchor) -> None:
        try:
            if self._writer is None or self._generation != self._connection.generation:
                self._establish()
            self._write_newer(anchor)
        except TSS2_Exception as error:
            self._come_back(error)
            # The answer may have been lost, and not the command.
            if self._last != anchor:
                self._write_newer(anchor)

    def _write_newer(self, anchor: Anchor) -> None:
        # The last one is what the TPM itself said, or what it said it had written.
        if anchor.version <= self._last.version:
            raise ConflictError(
                f"the anchor in the platform TPM has version {self._last.version}: it cannot go to {anchor.version}"
            )
        if self._writer is None:
            raise StateError("the anchor is closed")
        if self._shared:
            self._refuse_others()
        self._known = (self._last, anchor)
        self._writer.write(self._handle, self._index, anchor.to_bytes())
        self._known = (anchor,)

    def _come_back(self, error: TSS2_Exception) -> None:
        """Load everything anew after a failed command, or raise what it failed with."""
        if faults.tpm_code(error) in faults.NO_ROOM | faults.NO_USE:
            raise error
        if faults.tpm_code(error) is None:
            self._connection.reconnect()
        self._establish()

    def _establish(self) -> None:
        self._drop()
        self._writer = IndexWriter(self._connection, self._authority, self._srk_name)
        self._generation = self._connection.generation
        self._check()

    def _check(self) -> None:
        """Find the index by its Name and read it in an authenticated session."""
        connection = self._connection
        self._handle = nv_index.locate(connection, self._index.ref, _TITLE)
        with connection.storage_primary(self._srk_name) as (srk, _):
            connection.note_reset(srk)
            if self._shared and self._writer is not None and self._reader is None:
                # Kept, so that a write need not make the primary key again to read first.
                self._reader = connection.start_session(srk, TPM2_SE.HMAC, 0)
            with connection.session(srk, TPM2_SE.HMAC, 0) as session:
                found = self._held(session)
        self._refuse_unknown(found)
        self._known = (found,)

    def _refuse_others(self) -> None:
        if self._held(self._reader) not in self._known:
            # Which says whether it is another's index, an older value, or another's value.
            self._check()

    def _refuse_unknown(self, found: Anchor) -> None:
        if found.version < self._last.version:
            raise PlatformTpmError(
                f"the anchor in the platform TPM {self._connection.tcti!r} went back from version "
                f"{self._last.version} to {found.version}",
                next_step=nv_index.RECOVER,
            )
        if self._known and found not in self._known:
            raise PlatformTpmError(
                f"another keeper has moved the anchor in the platform TPM {self._connection.tcti!r} to version "
                f"{found.version}: two copies of one state directory are in use",
                next_step="Stop every manager and keeper but those of the newest copy, and start these again",
            )

    def _held(self, session: Any) -> Anchor:
        return Anchor.from_bytes(
            nv_index.read(self._connection, self._handle, self._index.ref, _TITLE, ANCHOR_BYTES, session)
        )

    def _drop(self) -> None:
        if self._writer is not None and self._generation == self._connection.generation:
            self._writer.close()
            if self._reader is not None:
                self._connection.flush(self._reader)
        self._writer = self._reader = None
