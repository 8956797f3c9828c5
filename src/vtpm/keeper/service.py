"""Answers the keeper's operations with the root key in custody. For the keeper alone."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from vtpm.errors import AccessDeniedError, ProtocolError, UsageError, VtpmError
from vtpm.keeper import wrapping
from vtpm.keeper.attesting import Attesting
from vtpm.keeper.custody import Custody
from vtpm.keeper.platforms import Platform
from vtpm.keeper.root_key import RootKey
from vtpm.platform_tpm.anchor import Anchor
from vtpm.platform_tpm.pcrs import all_zero
from vtpm.platform_tpm.root_policy import PcrSet
from vtpm.recovery_key import RecoveryPublicKey
from vtpm.secret import KEY_BYTES, Secret
from vtpm.tpm.launch_log import Gap, Launch
from vtpm.tpm.types import VtpmId
from vtpm.wire.call_threads import CallThreads, SharedCall
from vtpm.wire.keeper import (
    ActivatedSecret,
    AnchorState,
    Credential,
    KeeperStatus,
    Key,
    LaunchArgs,
    LaunchEntry,
    LaunchState,
    NewKey,
    NewKeyArgs,
    NoArgs,
    PcrDigest,
    PcrState,
    PlatformKind,
    PolicyLabel,
    PolicySet,
    PolicyState,
    Recovered,
    RecoveryText,
    UnwrapKeyArgs,
)
from vtpm.wire.packet_socket import Peer, close_fds

PROBE_TIMEOUT_S = 1.0
TPM_THREADS = 4
"""For calls that wait for the platform TPM; while it hangs, each is given up before long (custody.BUSY_S)."""
_LAST_REPLY_S = 0.05
_log = logging.getLogger(__name__)


class KeeperService:
    """What the keeper does for the manager.

    Args:
        platform: the platform TPM's kind.
        custody: the root key, and what the platform TPM does for it.
        selection: PCRs that the configuration names.
    """

    def __init__(self, platform: Platform, custody: Custody, selection: str) -> None:
        self.ending = asyncio.Event()
        """Set when a client has asked for the end."""
        self.ends_platform = False
        """Whether the embedded TPM is to end too."""
        self._platform = platform
        self._custody = custody
        self._selection = selection
        self._threads = CallThreads("tpm", TPM_THREADS)
        self._looking: SharedCall[str] = SharedCall(lambda: self._threads.run(self._look), "the platform TPM")
        self._attesting = attesting = Attesting(custody)
        self._blocking: Mapping[str, Callable[[Any, Peer], Any]] = {
            "anchor_key": lambda _args, _peer: Key(custody.anchor_key().reveal()),
            "channel_key": lambda _args, _peer: Key(custody.channel_key().reveal()),
            "read_anchor": self._read_anchor,
            "write_anchor": self._write_anchor,
            "policy": lambda _args, _peer: self._policy(),
            "policy_allow": self._allow,
            "policy_drop": self._drop,
            "services_pcr": lambda _args, _peer: custody.services_pcr(),
            "measure_services": self._measure,
            "measure_launch": self._measure_launch,
            "launches": lambda _args, _peer: self._launches(),
            "identity": lambda _args, _peer: attesting.identity(),
            "quote": lambda args, _peer: attesting.quote(args),
            "activate": self._activate,
            "new_recovery_key": lambda _args, _peer: RecoveryText(custody.new_recovery_key().to_text()),
            "confirm_recovery_key": self._confirm_recovery_key,
            "recovery_public_key": self._recovery_public_key,
            "recover": self._recover,
            "recovery_noted": self._recovery_noted,
        }

    async def handle(self, op: str, args: Any, fds: tuple[int, ...], peer: Peer) -> tuple[Any, tuple[int, ...]]:
        """Do one operation of wire.keeper; see packet_socket.Handler.

        Raises:
            ProtocolError: it came with descriptors.
            VtpmError: the root key is locked; or as the operation of KeeperClient says.
        """
        if fds:
            close_fds(fds)
            raise ProtocolError(f"vtpm-keeper takes no descriptors with {op!r}")
        if self._custody.locked is not None and op not in ("status", "end"):
            await self._threads.run(self._custody.try_again)
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
                key = wrapping.unwrap_key(self._custody.root.secret, args.vtpm_id, args.wrapped)
                _log.info("unwrapped the key of vTPM %s for process %d", args.vtpm_id, peer.pid)
                return Key(key.reveal()), ()
        if op not in self._blocking:
            raise ProtocolError(f"vtpm-keeper does not do {op!r}")
        return await self._threads.run(self._blocking[op], args, peer), ()

    def _new_key(self, vtpm_id: VtpmId) -> NewKey:
        key = Secret(os.urandom(KEY_BYTES))
        return NewKey(wrapped=wrapping.wrap_key(self._custody.root.secret, vtpm_id, key), key=key.reveal())

    # -- in threads -------------------------------------------------------------------------------------------------
    def _read_anchor(self, _args: NoArgs, _peer: Peer) -> AnchorState:
        anchor = self._custody.read_anchor()
        return AnchorState(anchor.version, anchor.digest)

    def _write_anchor(self, args: AnchorState, _peer: Peer) -> NoArgs:
        self._custody.write_anchor(Anchor(args.version, args.digest))
        return NoArgs()

    def _policy(self) -> PolicyState:
        sets, now = self._custody.policy()
        return PolicyState(
            str(now.selection),
            tuple(PolicySet(one.label, _hex(one), one.values == now.values) for one in sets),
            _hex(now),
        )

    def _allow(self, args: PolicySet, peer: Peer) -> PolicyState:
        try:
            values = tuple(bytes.fromhex(value) for value in args.values)
        except ValueError:
            raise UsageError("PCR values are hexadecimal") from None
        self._custody.allow(args.label, values)
        _log.warning("process %d had PCR set %r allowed", peer.pid, args.label)
        return self._policy()

    def _drop(self, args: PolicyLabel, peer: Peer) -> PolicyState:
        self._custody.drop(args.label)
        _log.warning("process %d had PCR set %r dropped", peer.pid, args.label)
        return self._policy()

    def _confirm_recovery_key(self, args: RecoveryText, _peer: Peer) -> NoArgs:
        self._custody.confirm_recovery_key(RecoveryPublicKey.from_text(args.text))
        return NoArgs()

    def _recovery_public_key(self, _args: NoArgs, _peer: Peer) -> RecoveryText:
        key = self._custody.recovery_public_key()
        return RecoveryText(key.to_text() if key else "")

    def _measure(self, args: PcrDigest, peer: Peer) -> PcrState:
        # Not the manager: what it is has been measured when it comes to ask.
        if peer.uid not in (0, os.geteuid()):
            raise AccessDeniedError(f"user {peer.uid} may not say what the services are")
        state = self._custody.measure_services(args.digest)
        _log.warning("process %d measured other services into PCR %d", peer.pid, state.pcr)
        return state

    def _measure_launch(self, args: LaunchArgs, _peer: Peer) -> NoArgs:
        self._custody.measure_launch(Launch(args.kind, args.measurement))
        return NoArgs()

    def _launches(self) -> LaunchState:
        launches, held = self._custody.launches()
        log = held.log
        return LaunchState(
            bank=str(launches.selection.bank),
            pcr=launches.pcr,
            value=held.value.hex(),
            start=log.start.hex() if log else "",
            entries=tuple(_entry(entry) for entry in log.entries) if log else (),
            replays=log is not None and log.value == held.value,
            doubt=held.doubt,
            log=str(launches.path),
        )

    def _activate(self, args: Credential, peer: Peer) -> ActivatedSecret:
        secret = self._attesting.activate(args)
        _log.info("activated a credential for process %d", peer.pid)
        return secret

    def _recover(self, args: RecoveryText, _peer: Peer) -> Recovered:
        return Recovered(self._custody.recover(args.text))

    def _recovery_noted(self, _args: NoArgs, _peer: Peer) -> NoArgs:
        self._custody.recovery_noted()
        return NoArgs()

    # -- status -----------------------------------------------------------------------------------------------------
    async def _status(self) -> KeeperStatus:
        problem = await self._probe()
        custody, locked = self._custody, self._custody.locked
        info = custody.info
        return KeeperStatus(
            kind=self._platform.kind,
            tcti=self._platform.tcti,
            manufacturer=f"{info.manufacturer} {info.vendor} {info.firmware}".strip() if info else "",
            pcr_selection=self._selection if locked else str(custody.root.opened_by.selection),
            protection=self._platform.protection,
            reachable=not problem,
            locked=locked.message if locked else "",
            locked_next_step=locked.next_step if locked else "",
            recovery=await asyncio.to_thread(custody.recovery),
            recovery_unnoted=await asyncio.to_thread(custody.recovery_unnoted),
            anchor_writes=custody.anchor_writes,
            resets=custody.resets,
            warnings=self._warnings() + ((problem,) if problem else ()),
        )

    async def _probe(self) -> str:
        """Return why the platform TPM does not answer now, or nothing."""
        try:
            return await self._looking.within(PROBE_TIMEOUT_S)
        except VtpmError as error:
            return error.message

    def _look(self) -> str:
        if self._custody.locked is not None:
            self._custody.try_again()
        return self._custody.probe()

    def _warnings(self) -> tuple[str, ...]:
        root = self._custody.root if self._custody.locked is None else None
        if self._platform.kind is PlatformKind.EMBEDDED:
            found = ["UNPROTECTED: the embedded TPM keeps the root key from nobody who reads the state directory"]
        else:
            found = _zero_warnings(root) if root else []
            if self._custody.resets:
                found.append(f"the platform TPM was reset under this host, {self._custody.resets} times")
        if self._custody.unconfirmed_recovery:
            found.append(
                "a recovery key was made and nobody confirmed to have it: until vtpm recovery-key makes another,"
                " it opens the vault as well"
            )
        if root is not None and str(root.opened_by.selection) != self._selection:
            found.append(f"the root key stays sealed under PCRs {root.opened_by.selection}, not {self._selection}")
        return tuple(found)


def _entry(entry: Launch | Gap) -> LaunchEntry:
    if isinstance(entry, Gap):
        return LaunchEntry("", "", entry.held.hex())
    return LaunchEntry(entry.kind, entry.measurement, "")


def _hex(one: PcrSet) -> tuple[str, ...]:
    return tuple(value.hex() for value in one.values)


def _zero_warnings(root: RootKey) -> list[str]:
    zero = all_zero(root.opened_by.by_index)
    if not zero:
        return []
    listed = ", ".join(map(str, zero))
    return [f"nothing had measured into PCRs {listed} when the root key was sealed: they bind it to no boot"]
