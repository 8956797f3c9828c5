"""kill -9 of every part, alone and together, at random moments of a run of NV writes: nothing answered is lost.

Moments and victims come from a seeded generator; the seed is printed, and VTPM_KILL_SEED gives one to use again.
"""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from tests.fault.writer import TpmGone, Writer, closing, data_socket
from tests.support.host import Host
from vtpm.client.manager_client import ManagerClient
from vtpm.errors import UnavailableError
from vtpm.wire.api import LifeState

IDLE = "idle"
"""A vTPM that nobody writes to; it is read while services are dead."""
VTPMD = "vtpmd"
SERVICES = ("manager", "keeper", "embedded-tpm", "launcher")
SETTLE_TIMEOUT_S = 20.0
MAX_DELAY_S = 0.02
MAX_WRITES_BEFORE = 8
SOAK_ROUNDS = int(os.environ.get("VTPM_KILL_ROUNDS", "2000"))
CROWD = 16
CROWD_ROUNDS = int(os.environ.get("VTPM_CROWD_ROUNDS", "500"))


@dataclass
class Tally:
    """What was done."""

    kills: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    writes: int = 0
    in_flight_kept: int = 0
    in_flight_lost: int = 0
    longest_recovery_s: float = 0.0

    def line(self, seed: int, took_s: float) -> str:
        killed = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items()))
        return (
            f"{datetime.now(UTC):%Y-%m-%d}: {self.rounds} rounds, {self.kills.total()} processes killed ({killed}), "
            f"{self.writes} writes answered, none lost; of writes in flight {self.in_flight_kept} were kept and "
            f"{self.in_flight_lost} not; longest recovery {self.longest_recovery_s:.1f} s; {took_s:.0f} s; seed {seed}"
        )


class KillRun:
    """One host, some vTPMs under writes and an idle one, and somebody who kills."""

    def __init__(self, host: Host, client: ManagerClient, seed: int, writers: int) -> None:
        self._host = host
        self._client = client
        self._random = random.Random(seed)
        self.tally = Tally()
        self._writers: dict[str, Writer] = {}
        self._busy = tuple(f"w{number}" for number in range(writers))
        for name in (*self._busy, IDLE):
            client.create(name)
            self._writers[name] = Writer(data_socket(client.start(name).tcti))

    def close(self) -> None:
        closing(list(self._writers.values())).close()

    def round(self) -> None:
        """Write, kill, bring the host back as an operator would, check."""
        victims = self._draw()
        busy = [self._writers[name] for name in self._busy]
        before = {name: writer.answered for name, writer in self._writers.items()}
        pids = {name: self._pid(name) for name in victims}
        for writer in busy:
            writer.start()
        self._random.choice(busy).await_writes(self._random.randrange(MAX_WRITES_BEFORE))
        time.sleep(self._random.random() * MAX_DELAY_S)
        _kill_at_once(pids.values())
        self.tally.kills.update(name if name in SERVICES else VTPMD for name in victims)
        self.tally.rounds += 1
        began = time.monotonic()
        if not {"launcher", IDLE} & victims:
            self._writers[IDLE].read_undisturbed()
        self._restart(victims)
        for name, writer in self._writers.items():
            if name == IDLE:
                works = not {"launcher", IDLE} & victims
            else:
                works = writer.stop()
            self._recover(name, writer, works, died="launcher" in victims or name in victims)
            answered, asked = writer.answered, writer.asked
            writer.check()
            self.tally.writes += answered - before[name]
            if asked > answered:
                if writer.answered == asked:
                    self.tally.in_flight_kept += 1
                else:
                    self.tally.in_flight_lost += 1
        self.tally.longest_recovery_s = max(self.tally.longest_recovery_s, time.monotonic() - began)

    def _draw(self) -> set[str]:
        """One victim, mostly; every service and every vtpmd, sometimes; any mixture, sometimes."""
        everyone = (*SERVICES, *self._writers)
        chance = self._random.random()
        if chance < 0.1:
            return set(everyone)
        if chance < 0.25:
            return set(self._random.sample(everyone, self._random.randrange(2, len(everyone))))
        return {self._random.choice(self._random.choice((SERVICES, self._busy)))}

    def _pid(self, name: str) -> int:
        pid = self._host.pid(name) if name in SERVICES else self._client.show(name).pid
        assert pid is not None, f"{name} does not run before the kill"
        return pid

    def _restart(self, victims: set[str]) -> None:
        dead = victims.intersection(SERVICES)
        if not dead:
            return
        if "manager" in dead:
            # Reaps it; it is dead already.
            self._host.kill("manager")
        else:
            self._host.stop_manager()
        self._host.start()

    def _recover(self, name: str, writer: Writer, works: bool, died: bool) -> None:
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        if works and not died:
            assert self._client.show(name).state is LifeState.RUNNING
            return
        while (state := self._client.show(name).state) not in (LifeState.FAILED, LifeState.STOPPED):
            assert time.monotonic() < deadline, f"{name} is still {state} after the kill: {writer.error}"
            time.sleep(0.005)
        self._client.start(name)
        writer.reconnect()


def _kill_at_once(pids: Iterable[int]) -> None:
    pidfds = []
    for pid in pids:
        with suppress(ProcessLookupError):
            pidfds.append(os.pidfd_open(pid))
    for pidfd in pidfds:
        # A vtpmd may have gone with its launcher.
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    for pidfd in pidfds:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        assert poller.poll(SETTLE_TIMEOUT_S * 1000)
        os.close(pidfd)


def _run(rounds: int, writers: int) -> Tally:
    seed = int(os.environ.get("VTPM_KILL_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"seed {seed}")
    began = time.monotonic()
    with Host() as host, host.client() as client:
        run = KillRun(host, client, seed, writers)
        try:
            while run.tally.rounds < rounds:
                run.round()
                if run.tally.rounds % 100 == 0 and run.tally.rounds < rounds:
                    print(run.tally.line(seed, time.monotonic() - began), flush=True)
        except BaseException as error:
            error.add_note(
                f"{run.tally.line(seed, time.monotonic() - began)}\n{host.log()[-4000:]}\n{host.service_logs()[-4000:]}"
            )
            raise
        finally:
            run.close()
        print(run.tally.line(seed, time.monotonic() - began), flush=True)
        return run.tally


@pytest.mark.timeout(480)
def test_answered_writes_are_there_when_anything_is_killed_at_random() -> None:
    _run(100, writers=2)


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_answered_writes_are_there_when_anything_is_killed_at_random_for_long() -> None:
    _run(SOAK_ROUNDS, writers=2)


@pytest.mark.soak
@pytest.mark.timeout(2 * 3600)
def test_answered_writes_are_there_when_anything_is_killed_under_sixteen_writers() -> None:
    tally = _run(CROWD_ROUNDS, writers=CROWD)
    # Otherwise they did not write at the same time.
    assert tally.in_flight_kept + tally.in_flight_lost > CROWD_ROUNDS


def test_a_service_that_is_dead_disturbs_no_read_when_a_vtpm_runs() -> None:
    """Manager and keeper both dead: reads go on in the same vtpmd; a write waits for the manager and then succeeds."""
    with Host() as host, host.client() as client:
        client.create("web")
        writer = Writer(data_socket(client.start("web").tcti))
        with closing([writer]):
            pid = client.show("web").pid
            host.kill("keeper")
            host.kill("manager")
            with pytest.raises(UnavailableError):
                client.show("web")
            for _ in range(100):
                writer.read_undisturbed()
            writer.start()
            host.start()
            writer.await_writes(5)
            assert writer.stop(), f"a write did not outlive the manager's restart: {writer.error}"
            writer.check()
            assert client.show("web").pid == pid


def test_start_recovers_a_vtpm_when_its_vtpmd_was_killed_without_a_guest() -> None:
    with Host() as host, host.client() as client:
        client.create("web")
        writer = Writer(data_socket(client.start("web").tcti))
        with closing([writer]):
            killed = client.show("web").pid
            assert killed is not None
            _kill_at_once([killed])
            with pytest.raises(TpmGone):
                writer.read_undisturbed()
            events = client.events(wait_s=10)
            while not any(event.kind == "instance_died" for event in events):
                events = client.events(after=events[-1].id, wait_s=10)
            assert client.show("web").state is LifeState.FAILED
            with pytest.raises(TpmGone, match="0x101"):
                writer.reconnect()
            assert client.start("web").state is LifeState.RUNNING
            writer.reconnect()
            writer.check()


def test_stop_ends_and_start_works_when_the_vtpmd_is_killed_while_it_is_stopped() -> None:
    with Host() as host, host.client() as client, host.client() as other:
        client.create("web")
        writer = Writer(data_socket(client.start("web").tcti))
        with closing([writer]), ThreadPoolExecutor(1) as pool:
            pid = client.show("web").pid
            assert pid is not None
            # It cannot answer, and so the stop is surely under way when it dies.
            os.kill(pid, signal.SIGSTOP)
            stopping = pool.submit(other.stop, "web", force=True)
            deadline = time.monotonic() + 5
            while client.show("web").state is not LifeState.STOPPING:
                assert time.monotonic() < deadline
            _kill_at_once([pid])
            assert stopping.result(5).state is LifeState.STOPPED
            client.start("web")
            writer.reconnect()
            writer.check()


def test_an_instance_ends_by_itself_when_it_is_told_to() -> None:
    """Ends of instances that libtpms' thread disturbs would be killed by the filter, and answered by a successor."""
    with Host() as host, host.client() as client:
        client.create("web")
        for _ in range(20):
            client.start("web")
            client.stop("web")
        assert "died" not in host.service_logs()
        assert "without an orderly" not in host.log()
