"""Answers the keeper's operations with the root key in memory. For the keeper alone."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from vtpm.errors import PlatformTpmError, ProtocolError
from vtpm.keeper import wrapping
from vtpm.keeper.platforms import Platform
from vtpm.keeper.root_key import RootKey
from vtpm.platform_tpm.bounded import abandoned_calls
from vtpm.platform_tpm.pcrs import all_zero
from vtpm.platform_tpm.platform_tpm import TpmInfo
from vtpm.secret import KEY_BYTES, Secret
from vtpm.tpm.types import VtpmId
from vtpm.wire.keeper import KeeperStatus, Key, NewKey, NewKeyArgs, NoArgs, PlatformKind, UnwrapKeyArgs
from vtpm.wire.packet_socket import Peer, close_fds

PROBE_TIMEOUT_S = 3.0
_LAST_REPLY_S = 0.05
_log = logging.getLogger(__name__)


class KeeperService:
    """What the keeper does for the manager.

    Args:
        platform: the platform TPM; asked only whether it is still there.
        root: stays in memory, so that keys are unwrapped whether or not the TPM is there.
        info: what the TPM said at start.
        warnings: further ones, for `status`.
    """

    def __init__(self, platform: Platform, root: RootKey, info: TpmInfo, warnings: tuple[str, ...] = ()) -> None:
        self.ending = asyncio.Event()
        """Set when a client has asked for the end."""
        self.ends_platform = False
        """Whether the embedded TPM is to end too."""
        self._platform = platform
        self._root = root
        self._info = info
        self._warnings = _warnings(platform, root) + warnings
        self._probing = asyncio.Lock()

    async def handle(self, op: str, args: Any, fds: tuple[int, ...], peer: Peer) -> tuple[Any, tuple[int, ...]]:
        """Do one operation of wire.keeper; see packet_socket.Handler.

        Raises:
            ProtocolError: it came with descriptors.
            StateError: a wrapped key does not open.
        """
        if fds:
            close_fds(fds)
            raise ProtocolError(f"vtpm-keeper takes no descriptors with {op!r}")
        match op, args:
            case "status", NoArgs():
                return await self._status(), ()
            case "end", NoArgs():
                _log.info("process %d asks for the end", peer.pid)
                self.ends_platform = True
                # Not at once: the reply goes out first.
                asyncio.get_running_loop().call_later(_LAST_REPLY_S, self.ending.set)
                return NoArgs(), ()
            case _, NewKeyArgs():
                return self._new_key(args.vtpm_id), ()
            case _, UnwrapKeyArgs():
                key = wrapping.unwrap_key(self._root.secret, args.vtpm_id, args.wrapped)
                _log.info("unwrapped the key of vTPM %s for process %d", args.vtpm_id, peer.pid)
                return Key(key.reveal()), ()
        raise ProtocolError(f"vtpm-keeper does not do {op!r}")

    def _new_key(self, vtpm_id: VtpmId) -> NewKey:
        key = Secret(os.urandom(KEY_BYTES))
        return NewKey(wrapped=wrapping.wrap_key(self._root.secret, vtpm_id, key), key=key.reveal())

    async def _status(self) -> KeeperStatus:
        async with self._probing:
            problem = await asyncio.to_thread(self._probe)
        return KeeperStatus(
            kind=self._platform.kind,
            tcti=self._platform.tcti,
            manufacturer=f"{self._info.manufacturer} {self._info.vendor} {self._info.firmware}".strip(),
            pcr_selection=str(self._root.opened_by.selection),
            protection=self._platform.protection,
            reachable=not problem,
            warnings=self._warnings + ((problem,) if problem else ()),
        )

    def _probe(self) -> str:
        """Return why the platform TPM does not answer now, or nothing."""
        if abandoned_calls():
            return "the platform TPM does not answer, and holds an earlier question"
        try:
            self._platform.open(PROBE_TIMEOUT_S).close()
        except PlatformTpmError as error:
            return str(error)
        return ""


def _warnings(platform: Platform, root: RootKey) -> tuple[str, ...]:
    if platform.kind is PlatformKind.EMBEDDED:
        return ("UNPROTECTED: the embedded TPM keeps the root key from nobody who reads the state directory",)
    if zero := all_zero(root.opened_by.by_index):
        listed = ", ".join(map(str, zero))
        return (f"nothing had measured into PCRs {listed} when the root key was sealed: they bind it to no boot",)
    return ()
