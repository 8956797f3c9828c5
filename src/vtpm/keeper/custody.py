"""The root key in the keeper's hands: open, or locked with a reason; and all that the platform TPM does for it.

One connection to the platform TPM is kept, and used by one thread at a time. When the TPM went away and is back (an
embedded one is started again), the call that found it so is made once more. For the keeper alone; blocking, so its
callers run it in threads.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from vtpm.errors import ConflictError, PlatformTpmError, StateError, VtpmError
from vtpm.keeper import escrow, recovered
from vtpm.keeper.launches import Held, Launches, refused_pcr
from vtpm.keeper.platforms import Platform
from vtpm.keeper.root_key import NewRoot, RootKey, has_root_file, open_root_key, save_root_file, seal_again
from vtpm.platform_tpm.anchor import Anchor, AnchorIndex
from vtpm.platform_tpm.pcrs import PcrSelection
from vtpm.platform_tpm.platform_tpm import PlatformTpm, TpmInfo
from vtpm.platform_tpm.root_policy import PcrSet, PcrSets
from vtpm.platform_tpm.sealed_blob import SealedBlob
from vtpm.recovery_key import RecoveryKey, RecoveryPublicKey
from vtpm.secret import KEY_BYTES, Secret
from vtpm.tpm.launch_log import Launch
from vtpm.wire.keeper import PcrState, PlatformKind

BUSY_S = 5.0
"""How long a call waits for the one before it: no longer than whoever asks for a write of the anchor waits."""
RETRY_S = 2.0
"""How long a lock is taken as it is before the platform TPM is asked again."""
_ANCHOR_KEY_LABEL = b"vtpm vault anchor key"
_CHANNEL_KEY_LABEL = b"vtpm channel key v1"
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Custody:
    """See the module.

    Args:
        state_dir: the keeper's own.
        platform: the platform TPM.
        new: what a new root key is sealed under; its fence holds for an old one too.
        launches: where what is launched is measured, if it is.
    """

    def __init__(self, state_dir: Path, platform: Platform, new: NewRoot, launches: Launches | None = None) -> None:
        self._state_dir = state_dir
        self._platform = platform
        self._new = new
        self._launches = launches
        self._busy = threading.Lock()
        self._tpm: PlatformTpm | None = None
        self._anchor: AnchorIndex | None = None
        # Outlives the connection: a TPM that comes back with another one is no TPM that was away.
        self._known_anchors: tuple[Anchor, ...] = ()
        self._root: RootKey | None = None
        self._locked: VtpmError = StateError("the root key was not opened yet")
        self._tried_at = 0.0
        self.info: TpmInfo | None = None
        """What the TPM said of itself when it was last connected to."""
        self.anchor_writes = 0
        self.resets = 0
        """How often the TPM was found to have been reset, or started again, while this keeper ran."""
        self._reset_count: int | None = None

    # -- opening ----------------------------------------------------------------------------------------------------
    def open(self) -> None:
        """Open the root key, or make one where there has never been one.

        A root key that does not open is no error here: `locked` says why, and `recover` helps.

        Raises:
            VtpmError: there is no root key yet, and none can be made.
        """
        with self._alone():
            if not has_root_file(self._state_dir) and not escrow.exists(self._state_dir):
                self._open()
                return
            try:
                self._open()
            except VtpmError as error:
                self._locked = error
                _log.error("%s", error)

    @property
    def locked(self) -> VtpmError | None:
        """Why the root key is not open; None when it is."""
        return None if self._root is not None else self._locked

    @property
    def root(self) -> RootKey:
        """The open root key. Raises VtpmError: it is locked, for the reason that `locked` gives."""
        if self._root is None:
            raise self._locked
        return self._root

    def try_again(self) -> None:
        """Try a locked root key again, where some time has passed: the TPM may be back, or in order again."""
        if self._root is None and time.monotonic() - self._tried_at >= RETRY_S:
            self.open()

    def close(self) -> None:
        """Forget the key and disconnect."""
        with self._busy:
            self._disconnect()
            if self._root is not None:
                self._root.secret.wipe()
                self._root = None

    def _open(self) -> None:
        self._tried_at = time.monotonic()
        self._disconnect()
        tpm = self._connect()
        if not has_root_file(self._state_dir):
            if escrow.exists(self._state_dir):
                raise StateError(
                    f"the root file of {self._state_dir} is missing, although its key is in escrow",
                    next_step="Put it back from a backup, or use vtpm recover",
                )
            self._check_fence(tpm)
        self._take(open_root_key(self._state_dir, tpm, self._new), tpm)

    def _take(self, root: RootKey, tpm: PlatformTpm) -> None:
        # The fence first: whatever fails after it, the key was opened in this boot.
        if self._new.fence_pcr is not None:
            tpm.extend_fence(root.blob, root.secret, self._new.fence_pcr)
        self._anchor = tpm.open_anchor(root.blob, root.secret, shared=self._is_shared)
        self._root = root

    def _check_fence(self, tpm: PlatformTpm) -> None:
        """Refuse to seal under a fence that is closed: the key would open again and again."""
        fence = self._new.fence_pcr
        if fence is None:
            return
        if any(tpm.pcr_values(PcrSelection(self._new.selection.bank, (fence,)))[fence]):
            raise PlatformTpmError(
                f"PCR {fence} is to be the fence, and something was extended into it in this boot",
                next_step="Reboot; if it is so again, choose a PCR that nothing else extends",
            )

    def _connect(self) -> PlatformTpm:
        tpm = self._platform.open()
        self._tpm = tpm
        self.info = tpm.info()
        count = tpm.reset_count()
        if self._reset_count not in (None, count):
            self.resets += 1
            _log.warning("the platform TPM was reset, or started again, while this host was running")
        self._reset_count = count
        return tpm

    def _disconnect(self) -> None:
        if self._anchor is not None:
            self._known_anchors = self._anchor.known
            self._anchor.close()
            self._anchor = None
        if self._tpm is not None:
            self._tpm.close()
            self._tpm = None

    # -- recovery ---------------------------------------------------------------------------------------------------
    def recovery(self) -> str:
        """Return the fingerprint of the recovery key, empty when none was made or the escrow is damaged."""
        try:
            return escrow.fingerprint(self._state_dir)
        except StateError as error:
            _log.error("%s", error)
            return ""

    def recovery_public_key(self) -> RecoveryPublicKey | None:
        """Return the public half of the recovery key, None where it is not kept. Raises as escrow.public_key."""
        with self._alone():
            return escrow.public_key(self._state_dir, self.root.secret)

    def new_recovery_key(self) -> RecoveryKey:
        """Make a recovery key; one that was made before counts until it is confirmed. Raises StoreError."""
        with self._alone():
            return escrow.make_recovery_key(self._state_dir, self.root.secret)

    def confirm_recovery_key(self, public: RecoveryPublicKey) -> None:
        """Let the recovery key that was made last count, and no other. Raises as escrow.confirm_recovery_key."""
        with self._alone():
            escrow.confirm_recovery_key(self._state_dir, self.root.secret, public)

    @property
    def unconfirmed_recovery(self) -> bool:
        """Whether a recovery key was made and not confirmed."""
        return escrow.unconfirmed(self._state_dir)

    def recover(self, text: str) -> bool:
        """Open the root key by the recovery key, and seal it to the platform TPM as it is now.

        Again, with the root key open, it only says what it said: whoever asked may not have heard it.

        Returns:
            Whether the anchor is still the one that was; False when it was lost with the TPM, and made anew.
        Raises:
            UsageError: the text is no recovery key.
            StateError: it is another one's, or nothing was escrowed.
            PlatformTpmError: the TPM refuses, or the fence is closed in this boot.
            StoreError: the new root file is not durable.
        """
        key = RecoveryKey.from_text(text)
        with self._alone():
            secret = escrow.open_escrow(self._state_dir, key)
            if self._root is None:
                self._disconnect()
                tpm = self._connect()
                self._check_fence(tpm)
                recovered.note(self._state_dir, key.public.fingerprint)
                self._take(seal_again(self._state_dir, tpm, secret, self._new), tpm)
                _log.warning("the root key was recovered with recovery key %s", key.public.fingerprint)
            elif secret != self._root.secret:
                raise StateError("the recovery key's escrow is of another root key than the one that is open")
        return self.read_anchor().version > 0

    def recovery_unnoted(self) -> str:
        """Return the fingerprint of a recovery key that was used and is in no audit log yet; empty: there is none."""
        try:
            return recovered.noted(self._state_dir)
        except StateError as error:
            _log.error("%s", error)
            return ""

    def recovery_noted(self) -> None:
        """Forget that a recovery key was used: the audit log has it. Raises StoreError."""
        with self._alone():
            recovered.forget(self._state_dir)

    # -- policy -----------------------------------------------------------------------------------------------------
    def policy(self) -> tuple[PcrSets, PcrSet]:
        """Return the sets that may open the root key, and the PCRs as they are now (a fence's as it was before)."""
        return self.ask(lambda tpm: (tpm.allowed(self.root.blob, self.root.secret), self._now(tpm)))

    def allow(self, label: str, values: tuple[bytes, ...]) -> None:
        """Let one more set of PCR values open the root key. Raises as PlatformTpm.allow, and StoreError."""

        def allow(tpm: PlatformTpm) -> None:
            root = self.root
            more = PcrSet(label, root.opened_by.selection, values)
            blob = tpm.allow(
                root.blob,
                root.secret,
                more,
                self._save,
                zero_pcrs=self._new.zero_pcrs,
                fence_pcr=self._new.fence_pcr,
                services_pcr=self._new.services_pcr,
            )
            self._root = RootKey(root.secret, blob, root.opened_by)

        self.ask(allow)

    def drop(self, label: str) -> None:
        """Let a set open the root key no more. Raises as PlatformTpm.drop, and StoreError."""

        def drop(tpm: PlatformTpm) -> None:
            root = self.root
            self._root = RootKey(root.secret, tpm.drop(root.blob, root.secret, label, self._save), root.opened_by)

        self.ask(drop)

    def _now(self, tpm: PlatformTpm) -> PcrSet:
        opened_by = self.root.opened_by
        # Authenticated: what is read here is what an operator allows.
        values = tpm.pcr_values(opened_by.selection, self.root.blob)
        fence = self._new.fence_pcr
        if fence is not None and fence in values:
            values[fence] = opened_by.by_index[fence]
        return PcrSet.of("now", opened_by.selection, values)

    def _save(self, blob: SealedBlob) -> None:
        save_root_file(self._state_dir, blob)
        root = self.root
        self._root = RootKey(root.secret, blob, root.opened_by)

    # -- services ---------------------------------------------------------------------------------------------------
    def services_pcr(self) -> PcrState:
        """Return the PCR that the services are measured into.

        Raises:
            ConflictError: they are not.
            PlatformTpmError: the platform TPM does not answer.
        """
        selection = self._services_selection()
        return self._ask_any(lambda tpm: _state_of(selection, tpm))

    def measure_services(self, digest: bytes) -> PcrState:
        """Extend that PCR, and return it. Raises UsageError: another size; and as services_pcr."""
        selection = self._services_selection()
        # Not `_ask_any`: whether an extension whose answer was lost took place is for the caller to find out.
        with self._busy:
            tpm = self._tpm or self._connect()
            tpm.extend(selection.indexes[0], selection.bank, digest)
            return _state_of(selection, tpm)

    def _services_selection(self) -> PcrSelection:
        if self._new.services_pcr is None:
            raise ConflictError(
                "the keeper was started without a PCR for the services",
                next_step="Run `vtpm shutdown`, then start vtpm-managerd again",
            )
        return PcrSelection(self._new.selection.bank, (self._new.services_pcr,))

    # -- launches ---------------------------------------------------------------------------------------------------
    def measure_launch(self, launch: Launch) -> None:
        """Have a launch extended into the PCR for launches, once in a boot.

        Raises:
            ConflictError: there is no such PCR, or it must not be extended; or as Launches.measure.
            PlatformTpmError: the TPM does not answer, and this keeper has not seen the launch in the PCR.
            StoreError: as Launches.measure.
        """
        launches = self.launches_of_open_root()
        # The count is that of the last connection; a TPM that is reset under one is found out by its sessions.
        if not launches.known(launch, self._reset_count):
            # Harmless if it is done twice: the log tells whether the first time came to its end.
            self._ask_any(lambda tpm: launches.measure(launch, tpm))

    def launches(self) -> tuple[Launches, Held]:
        """Return the log of launches beside its PCR. Raises as measure_launch."""
        launches = self.launches_of_open_root()
        return launches, self._ask_any(launches.look)

    def launches_of_open_root(self) -> Launches:
        """Return where launches are measured. Raises ConflictError: nowhere; VtpmError: the root key is locked."""
        launches = self._launches
        if launches is None:
            raise ConflictError(
                "the keeper was started without a PCR for launches",
                next_step="Run `vtpm shutdown`, then start vtpm-managerd again",
            )
        if launches.pcr in self.root.opened_by.selection.indexes:
            raise refused_pcr(launches.pcr, f"the root key is sealed under {self.root.opened_by.selection}")
        return launches

    # -- anchor -----------------------------------------------------------------------------------------------------
    def anchor_key(self) -> Secret:
        """Return the key that the vault's root records are authenticated with."""
        return self._derived(_ANCHOR_KEY_LABEL)

    def channel_key(self) -> Secret:
        """Return the key that the private key of this host's channel to its peers is encrypted with."""
        return self._derived(_CHANNEL_KEY_LABEL)

    def _derived(self, label: bytes) -> Secret:
        return Secret(HKDFExpand(SHA256(), KEY_BYTES, label).derive(self.root.secret.reveal()))

    def read_anchor(self) -> Anchor:
        """Return what the platform TPM holds. Raises PlatformTpmError."""
        return self.ask(lambda _: self._open_anchor().read())

    def write_anchor(self, anchor: Anchor) -> None:
        """Write a newer anchor. Raises ConflictError, PlatformTpmError as AnchorIndex.write."""
        self.ask(lambda _: self._open_anchor().write(anchor))
        self.anchor_writes += 1

    @property
    def _is_shared(self) -> bool:
        # The embedded TPM is this state directory's alone, and a lock in it keeps others out.
        return self._platform.kind is not PlatformKind.EMBEDDED

    def _open_anchor(self) -> AnchorIndex:
        root = self.root
        if self._anchor is None:
            assert self._tpm is not None
            self._anchor = self._tpm.open_anchor(root.blob, root.secret, self._known_anchors, shared=self._is_shared)
        return self._anchor

    # -- the TPM ----------------------------------------------------------------------------------------------------
    def probe(self) -> str:
        """Return why the platform TPM does not answer now, or nothing."""
        try:
            self._ask_any(lambda tpm: tpm.info())
        except PlatformTpmError as error:
            return str(error)
        return ""

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Have the TPM to oneself; so many calls of a TPM that hangs end soon, and one is left behind.

        Raises:
            PlatformTpmError: another call has it for longer than BUSY_S.
        """
        if not self._busy.acquire(timeout=BUSY_S):
            raise PlatformTpmError(
                f"the platform TPM {self._platform.tcti!r} does not answer: an earlier call waits for it",
                next_step="Check that nothing else holds it, or start it again",
            )
        try:
            yield
        finally:
            self._busy.release()

    def ask(self, call: Callable[[PlatformTpm], T]) -> T:
        """Have the TPM do something for an open root key; once more if it has gone and is back."""
        _ = self.root
        return self._ask_any(call)

    def _ask_any(self, call: Callable[[PlatformTpm], T]) -> T:
        with self._alone():
            if self._tpm is not None:
                try:
                    return self._counted(call, self._tpm)
                except PlatformTpmError as error:
                    _log.warning("the platform TPM is connected to again: %s", error)
            self._disconnect()
            return self._counted(call, self._connect())

    def _counted(self, call: Callable[[PlatformTpm], T], tpm: PlatformTpm) -> T:
        result = call(tpm)
        if self._anchor is not None and self._anchor.reset_seen:
            # The next call connects anew, and counts it.
            self._disconnect()
        return result


def _state_of(selection: PcrSelection, tpm: PlatformTpm) -> PcrState:
    (index,) = selection.indexes
    values, reset_count = tpm.pcr_state(selection)
    return PcrState(str(selection.bank), index, values[index], reset_count)
