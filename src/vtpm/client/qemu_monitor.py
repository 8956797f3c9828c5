"""One QEMU's monitor (QMP): the commands that a live migration needs, news of events, and the loss of the connection.

For live_migration alone, which decides; here is only asked and told. What QEMU says is bounded and checked: a line has
at most MAX_LINE_BYTES, events are noted and not kept, and answers are of their form or refused.
Source: QEMU, qapi/migration.json, qapi/run-state.json, qapi/tpm.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

from qemu.qmp import ExecuteError, Message, QMPClient, QMPError, Runstate

from vtpm.client.decode import decode
from vtpm.errors import ConflictError, ProtocolError, UnavailableError, UsageError

MAX_LINE_BYTES = 64 * 1024
CONNECT_LIMIT_S = 10.0
ANSWER_LIMIT_S = 30.0
_HANG_UP_LIMIT_S = 2.0
_MAX_REASON_CHARS = 300
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_NEWS = frozenset({"MIGRATION", "STOP", "RESUME", "SHUTDOWN"})
_NULL_HANDLER = logging.NullHandler()

T = TypeVar("T")


@dataclass(frozen=True)
class QmpAddress:
    """Where a QEMU's monitor is reached.

    Args:
        where: path of a unix socket, or host and port.
    """

    where: str | tuple[str, int]

    @classmethod
    def parse(cls, text: str) -> QmpAddress:
        """Return the address that a text names: the path of a unix socket, or HOST:PORT, which has no slash.

        Raises:
            UsageError: it is neither.
        """
        if "/" in text:
            return cls(text)
        host, _, port = text.rpartition(":")
        if not host or not _PORT.fullmatch(port) or int(port) >= 1 << 16:
            raise UsageError(
                f"{text[:80]!r} is no address of a QEMU's monitor",
                next_step="Give the path of its unix socket (./NAME in this folder), or HOST:PORT",
            )
        return cls((host.strip("[]"), int(port)))

    def __str__(self) -> str:
        return self.where if isinstance(self.where, str) else f"{self.where[0]}:{self.where[1]}"


@dataclass(frozen=True)
class RunState:
    """Of a virtual machine; status as QEMU names it: running, paused, inmigrate, finish-migrate, postmigrate, ..."""

    running: bool
    status: str


@dataclass(frozen=True)
class Progress:
    """How a migration goes.

    Args:
        status: as QEMU names it: none, setup, active, device, completed, failed, cancelled, ...
        transferred_bytes: of the guest's memory, so far.
        remaining_bytes: what is still to go, as far as is known; the guest goes on changing it.
        total_bytes: the guest's memory.
        reason: why it failed, or empty.
        blocked: why this machine cannot be migrated at all, or empty.
    """

    status: str
    transferred_bytes: int = 0
    remaining_bytes: int = 0
    total_bytes: int = 0
    reason: str = ""
    blocked: str = ""


class MonitorLost(UnavailableError):
    """The connection has ended, or no answer came in time. Whether what was asked for is done is not known."""


class QemuRefusal(ConflictError):
    """QEMU has refused a command, which has done nothing."""


class Monitor:
    """A connection to one QEMU.

    Args:
        who: the QEMU, for messages.
        news: set when something has happened of which the answers may tell, or when the connection has ended.
    """

    def __init__(self, who: str, address: QmpAddress, news: asyncio.Event) -> None:
        self.who = who
        self._address = address
        self._news = news
        self._client = QMPClient(readbuflen=MAX_LINE_BYTES)
        self._client.events.event_filter = self._note
        self._watch: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Connect. Raises UnavailableError: nobody answers there, or no QEMU does."""
        # Its failures are in the errors raised here, and would else be on stderr as well.
        logging.getLogger("qemu.qmp").addHandler(_NULL_HANDLER)
        try:
            async with asyncio.timeout(CONNECT_LIMIT_S):
                await self._client.connect(self._address.where)
        except QMPError as error:
            raise UnavailableError(
                f"{self.who} cannot be reached at {self._address}: {_cut(error)}",
                next_step="Give the socket of its -qmp or -mon option, which you have to have access to",
            ) from error
        except TimeoutError:
            raise UnavailableError(
                f"{self.who} does not greet at {self._address} within {CONNECT_LIMIT_S:g} s",
                next_step="A monitor serves one client at a time: see that no other one is connected",
            ) from None
        self._watch = asyncio.create_task(self._watch_end())

    @property
    def lost(self) -> bool:
        """Whether the connection has ended."""
        return self._client.runstate is not Runstate.RUNNING

    async def close(self) -> None:
        """Hang up, if connected."""
        if self._watch is None:
            return
        self._watch.cancel()
        # Why it has ended, if it has, was told already.
        with contextlib.suppress(QMPError, OSError, EOFError, ValueError, TimeoutError):
            async with asyncio.timeout(_HANG_UP_LIMIT_S):
                await self._client.disconnect()

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, limit_s: float | None = ANSWER_LIMIT_S
    ) -> object:
        """Have a command carried out and return its answer.

        Args:
            limit_s: within which it has to come; None: no limit of its own.
        Raises:
            QemuRefusal: with QEMU's reason.
            MonitorLost: no answer.
        """
        try:
            async with asyncio.timeout(limit_s):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise QemuRefusal(f"{self.who} refuses {command}: {_cut(error)}") from error
        except QMPError as error:
            raise MonitorLost(
                f"the connection to {self.who} is lost" if self.lost else f"{self.who} answers {command} with no answer"
            ) from error
        except TimeoutError:
            raise MonitorLost(f"{self.who} has not answered {command} within {limit_s:g} s") from None

    async def run_state(self, limit_s: float = ANSWER_LIMIT_S) -> RunState:
        """Return what the machine does; arguments and errors as `execute`."""
        return self._read(RunState, await self.execute("query-status", limit_s=limit_s), "query-status")

    async def migration(self, limit_s: float | None = ANSWER_LIMIT_S) -> Progress:
        """Return how the machine's last migration goes or went; arguments and errors as `execute`."""
        where = "query-migrate"
        answer = self._read(dict[str, Any], await self.execute(where, limit_s=limit_s), where)
        ram = self._read(_Ram, answer["ram"], f"{where}.ram") if "ram" in answer else _Ram(0, 0, 0)
        blocked = self._read(list[str], answer.get("blocked-reasons", []), f"{where}.blocked-reasons")
        return Progress(
            # A machine that was never migrated has none.
            status=self._read(str, answer.get("status", "none"), f"{where}.status"),
            transferred_bytes=ram.transferred,
            remaining_bytes=ram.remaining,
            total_bytes=ram.total,
            reason=_cut(self._read(str, answer.get("error-desc", ""), f"{where}.error-desc")),
            blocked=_cut("; ".join(blocked)),
        )

    async def machine_uuid(self) -> UUID:
        """Return the machine's uuid, all zeros if it was given none. Raises as `execute`."""
        return self._read(dict[str, UUID], await self.execute("query-uuid"), "query-uuid").get("UUID", UUID(int=0))

    async def emulated_tpms(self) -> list[str]:
        """Return the front-ends, such as tpm-crb, of the TPMs that an emulator serves. Raises as `execute`."""
        tpms = self._read(list[_Tpm], await self.execute("query-tpm"), "query-tpm")
        return [tpm.model for tpm in tpms if tpm.options.type == "emulator"]

    def _read(self, kind: type[T], answer: object, where: str) -> T:
        try:
            return decode(kind, answer, where)
        except ProtocolError as error:
            # As good as none: whatever was asked about is not known.
            raise MonitorLost(f"what {self.who} answers cannot be read: {error.message}") from error

    def _note(self, event: Message) -> bool:
        if event["event"] in _NEWS:
            self._news.set()
        # Nothing is kept: however many events come, what counts is what QEMU answers when asked next.
        return False

    async def _watch_end(self) -> None:
        while not self.lost:
            await self._client.runstate_changed()
        self._news.set()


@dataclass(frozen=True)
class _Ram:
    transferred: int
    remaining: int
    total: int


@dataclass(frozen=True)
class _TpmOptions:
    type: str


@dataclass(frozen=True)
class _Tpm:
    model: str
    options: _TpmOptions


def _cut(reason: object) -> str:
    return str(reason)[:_MAX_REASON_CHARS]
