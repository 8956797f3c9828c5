"""Drives QEMU's live migration of a guest whose vTPM moves with it, over the monitors of both QEMUs.

The order is what keeps the guest: the source completes, the destination has the guest and is paused, the vTPM arrives
there, the guest goes on there. Before the source has completed everything is taken back, and the guest runs on where it
was; after that the source is never told to go on, whatever happens: its vTPM may be the destination's, and a guest that
runs twice is worse than one that waits. What is not known is said, and not guessed.

For the command line, which runs as somebody who may open the monitors; the manager, which may not, is a callable here.
Source: QEMU 7.2 and 9, migration/migration.c (migration_completion, migration_iteration_finish,
process_incoming_migration_bh), monitor/qmp-cmds.c (qmp_stop, qmp_cont).
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, TypeVar
from uuid import UUID

from vtpm.client.migration_checks import COMPLETED, ENDS, check_fit
from vtpm.client.qemu_monitor import Monitor, MonitorLost, Progress, QemuRefusal, QmpAddress
from vtpm.errors import UsageError, VtpmError

SETTLE_LIMIT_S = 30.0
"""For what QEMU does by itself within moments: end a migration that is cancelled, let the guest run again."""
LAST_WORD_LIMIT_S = 5.0
"""For an answer that no more than explains a failure."""
_PROGRESS_EVERY_S = 0.5
_TRANSPORTS = ("tcp:", "unix:", "vsock:", "rdma:")
"""Those that have a way back, by which the destination says that it has the guest; exec, fd and file have none."""
_CAPABILITIES = {
    # Without it the source completes before the destination has loaded its TPM: if that is refused, the guest is lost.
    "return-path": True,
    "events": True,
    # The guest would run at the destination before all of it is there, and before its vTPM is.
    "postcopy-ram": False,
    # The source would wait at the end for a command that nobody gives.
    "pause-before-switchover": False,
}
_ASK_THE_SOURCE = (
    "Let neither QEMU go on before the source's has said (query-migrate) whether it has completed: then the guest is "
    "the destination's alone, else the source's. If the source's has ended, the destination's has the guest if it is "
    "paused"
)
_ASK_THE_DESTINATION = (
    "Never let the source's go on. Ask the destination's (query-status): if it is paused it has the guest, "
    "which goes on there once it has its vTPM"
)
_FINISH = "Never let the source's go on. Give the vTPM to the destination, then let its QEMU go on (cont)"
_ANEW = "Start the destination's QEMU anew before another attempt"

T = TypeVar("T")


class Whereabouts(enum.Enum):
    """Where a guest is that was not moved as it should have been."""

    SOURCE = "source"
    """It is the source's, as is its vTPM; the destination's QEMU never runs it."""
    BETWEEN = "between"
    """The source's migration has completed; the vTPM was not seen to arrive, and nobody runs the guest."""
    DESTINATION = "destination"
    """It is the destination's, as is its vTPM; whether it runs there, the message says."""
    UNKNOWN = "unknown"
    """A QEMU does not answer that would have to be asked."""


class LiveMigrationError(VtpmError):
    """A migration that was begun did not come to its end; `whereabouts` says whose the guest is."""

    code = "live_migration"
    exit_status = 16

    def __init__(self, message: str, whereabouts: Whereabouts = Whereabouts.UNKNOWN, *, next_step: str = "") -> None:
        super().__init__(message, next_step=next_step)
        self.whereabouts = whereabouts


class InterruptedMigrationError(LiveMigrationError):
    """The same, on the caller's interrupt."""

    code = "interrupted"
    exit_status = 130


def drive(
    source: QmpAddress,
    destination: QmpAddress,
    uri: str,
    *,
    arrived: Callable[[], None],
    progress: Callable[[Progress], None],
    limit_s: float,
    departing: Callable[[], None] = lambda: None,
    vm_uuid: UUID | None = None,
) -> None:
    """Move a running guest to a QEMU that waits for it; when this returns, it runs there.

    For the main thread, where an interrupt (SIGINT) ends the migration in order; a second one does not wait for that.

    Args:
        source: the monitor of the guest's QEMU.
        destination: that of a QEMU started with `-incoming defer`.
        uri: where the destination is to listen, and the source finds it: QEMU's migration URI, such as tcp:HOST:PORT.
        arrived: called when the source has completed and the destination is paused; returns when the vTPM is the
            destination's. What it raises is raised on, saying where the guest waits.
        progress: called at most twice a second, and at each change. It raises nothing.
        limit_s: within which the source has to complete; else the guest stays there.
        departing: called once both QEMUs are found fit, before anything leaves. What it raises is raised on.
        vm_uuid: None, or what the guest's uuid has to be.
    Raises:
        UsageError, ConflictError, UnavailableError: nothing was begun; the guest runs where it was.
        LiveMigrationError: it was begun.
    """
    if not uri.startswith(_TRANSPORTS):
        raise UsageError(
            f"a guest with a vTPM cannot go by {uri[:80]!r}: there is no way back that says that it has come",
            next_step=f"Use one of {' '.join(_TRANSPORTS)}, such as tcp:HOST:PORT",
        )
    move = _Move(source, destination, uri, progress)
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        try:
            _run(loop, move.prepare(vm_uuid))
            departing()
            try:
                _run(loop, move.migrate(limit_s))
            except KeyboardInterrupt:
                raise InterruptedMigrationError(
                    "interrupted before it was known whose the guest is", Whereabouts.UNKNOWN, next_step=_ASK_THE_SOURCE
                ) from None
            _release(arrived)
            _run(loop, move.go_on())
        finally:
            loop.run_until_complete(move.close())


def _run(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> None:
    """Do the work to its end. An interrupt cancels it, however often it comes, and nothing else that the loop does.

    Raises:
        KeyboardInterrupt: it has let itself be cancelled.
    """
    task = loop.create_task(work)
    # Who has it ignored, as a shell does for what it starts in the background, means that.
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        loop.run_until_complete(task)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        if heard:
            loop.remove_signal_handler(signal.SIGINT)


def _release(arrived: Callable[[], None]) -> None:
    waits = "The source's migration has completed, and the guest waits at the destination, paused"
    try:
        arrived()
    except VtpmError as error:
        # Of its own kind, since that is what went wrong; where the guest is, nobody else can say.
        error.message = f"{error.message}. {waits}"
        error.next_step = f"{error.next_step}. {_FINISH}" if error.next_step else _FINISH
        raise
    except KeyboardInterrupt:
        raise InterruptedMigrationError(
            f"interrupted before the vTPM was seen to arrive. {waits}", Whereabouts.BETWEEN, next_step=_FINISH
        ) from None


class _Move:
    """One guest's; its methods are called in their order, each once."""

    def __init__(
        self, source: QmpAddress, destination: QmpAddress, uri: str, progress: Callable[[Progress], None]
    ) -> None:
        self._news = asyncio.Event()
        self._source = Monitor("the source's QEMU", source, self._news)
        self._destination = Monitor("the destination's QEMU", destination, self._news)
        self._uri = uri
        self._progress = progress
        self._begun = False
        self._interrupted = False

    async def prepare(self, vm_uuid: UUID | None) -> None:
        """Connect, check both machines, and set what the order rests on."""
        for monitor in (self._source, self._destination):
            await monitor.connect()
        await check_fit(self._source, self._destination, vm_uuid)
        capabilities = [{"capability": name, "state": state} for name, state in _CAPABILITIES.items()]
        for monitor in (self._source, self._destination):
            await monitor.execute("migrate-set-capabilities", {"capabilities": capabilities})
        # As -S does, which cannot be asked for: then it is paused when it has the guest, and waits for its vTPM.
        await self._destination.execute("stop")

    async def migrate(self, limit_s: float) -> None:
        """Return when the source has completed and the destination is paused; else the guest stays at the source."""
        end, why = await self._to_the_end(limit_s)
        if end.status != COMPLETED:
            reason = end.reason or "QEMU gives no reason, the logs of both QEMUs may"
            await self._fail_at_source(why or f"QEMU's migration has {end.status}: {reason}")
        # An interrupt, or the time limit, may come too late to keep the guest here: then it goes on to the end.
        await self._check_both_stand_still()

    async def _to_the_end(self, limit_s: float) -> tuple[Progress, str]:
        """Return how it has ended, and why it was broken off or not begun, or an empty text."""
        try:
            async with asyncio.timeout(limit_s):
                await self._begin()
                return await self._follow(), ""
        except TimeoutError:
            why = f"the migration has not completed within {limit_s:g} s"
        except asyncio.CancelledError:
            why = self._note_interrupt()
        except (MonitorLost, QemuRefusal) as error:
            why = error.message
        return await self._break_off(why) if self._begun else Progress("none"), why

    async def _begin(self) -> None:
        await self._destination.execute("migrate-incoming", {"uri": self._uri})
        # Until the source refuses it.
        self._begun = True
        try:
            await self._source.execute("migrate", {"uri": self._uri})
        except QemuRefusal:
            self._begun = False
            raise

    async def _follow(self) -> Progress:
        """Tell of the source's migration until it has ended. Raises MonitorLost: before that, one is lost."""
        while True:
            self._news.clear()
            # While the machine's state is taken, which waits for the vTPM, QEMU answers nothing.
            state = await self._source.migration(limit_s=None)
            self._progress(state)
            if state.status in ENDS:
                return state
            if self._destination.lost:
                raise MonitorLost(f"the connection to {self._destination.who} is lost")
            await self._wait()

    async def _break_off(self, why: str) -> Progress:
        """Have the source end its migration, and return how it has ended: it may have completed before."""
        try:
            # Does nothing when none is under way.
            await self._source.execute("migrate_cancel")
            end = await self._ask_until(self._source.migration, lambda state: state.status in ENDS)
        except (MonitorLost, QemuRefusal) as error:
            await self._fail_in_doubt(why if error.message == why else f"{why}; then {error.message}")
        if end.status not in ENDS:
            late = f"{self._source.who} has not ended its migration within {SETTLE_LIMIT_S:g} s"
            await self._fail_in_doubt(f"{why}; then {late}")
        return end

    async def _fail_at_source(self, why: str) -> NoReturn:
        """Fail, saying whether the guest runs again where it was, as QEMU sees to by itself. It is not told to."""
        try:
            state = await self._ask_until(self._source.run_state, lambda state: state.status != "finish-migrate")
        except MonitorLost as error:
            await self._fail_in_doubt(f"{why}; then {error.message}")
        if state.running:
            self._fail(f"{why}. The guest runs on at the source", Whereabouts.SOURCE, _ANEW)
        self._fail(
            f"{why}. The guest is still the source's, but does not run there: it is {state.status}",
            Whereabouts.SOURCE,
            f"See what keeps it, then let the source's go on (cont), never the destination's. {_ANEW}",
        )

    async def _check_both_stand_still(self) -> None:
        try:
            there = await self._ask_until(self._destination.run_state, lambda state: state.status != "inmigrate")
            here = await self._source.run_state()
        except MonitorLost as error:
            await self._fail_in_doubt(
                f"the source's migration has completed, but {error.message}", _ASK_THE_DESTINATION
            )
        except asyncio.CancelledError:
            self._note_interrupt()
            self._fail("interrupted when the source's migration had completed", Whereabouts.BETWEEN, _FINISH)
        if here.running or there.status != "paused":
            await self._fail_in_doubt(
                "the source's migration has completed, but its guest does not stand still there, or is not paused "
                "at the destination; its vTPM stays where it is",
                "Stop both, and find out which one has the guest that is to go on",
            )

    async def go_on(self) -> None:
        """Let the guest run at the destination, which has its vTPM now."""
        why = ""
        try:
            await self._destination.execute("cont")
            state = await self._destination.run_state()
            if not state.running:
                why = f"it is {state.status}"
        except (MonitorLost, QemuRefusal) as error:
            why = error.message
        except asyncio.CancelledError:
            why = self._note_interrupt()
        if why:
            self._fail(
                f"guest and vTPM are at the destination, but the guest is not seen to run there: {why}",
                Whereabouts.DESTINATION,
                "Never let the source's go on. See what the destination's does (query-status), and let it go on (cont)",
            )

    async def close(self) -> None:
        """Hang up."""
        for monitor in (self._source, self._destination):
            await monitor.close()

    async def _ask_until(self, ask: Callable[[], Awaitable[T]], settled: Callable[[T], bool]) -> T:
        """Ask at each news until the answer is settled; return the last answer when SETTLE_LIMIT_S have passed."""
        clock = asyncio.get_running_loop().time
        end_s = clock() + SETTLE_LIMIT_S
        while True:
            self._news.clear()
            answer = await ask()
            if settled(answer) or clock() >= end_s:
                return answer
            await self._wait()

    async def _wait(self) -> None:
        """Return at the next news, and at the latest when it is time to ask again."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PROGRESS_EVERY_S):
                await self._news.wait()

    def _note_interrupt(self) -> str:
        """Take the interrupt as ours to answer."""
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        self._interrupted = True
        return "interrupted"

    async def _fail_in_doubt(self, why: str, next_step: str = _ASK_THE_SOURCE) -> NoReturn:
        """Fail where it is not known whose the guest is, with what those say that still answer."""
        words = []
        for monitor in (self._source, self._destination):
            with contextlib.suppress(MonitorLost, QemuRefusal):
                words.append(f"{monitor.who} says {(await monitor.run_state(LAST_WORD_LIMIT_S)).status}")
        said = ", ".join(words) or "neither QEMU answers"
        self._fail(f"{why}. Whose the guest is, is not known: {said}", Whereabouts.UNKNOWN, next_step)

    def _fail(self, why: str, whereabouts: Whereabouts, next_step: str) -> NoReturn:
        kind = InterruptedMigrationError if self._interrupted else LiveMigrationError
        raise kind(why, whereabouts, next_step=next_step) from None
