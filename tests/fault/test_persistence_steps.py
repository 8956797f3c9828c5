"""kill -9 of manager, keeper and embedded TPM before each call by which they make something last.

The steps are seen from outside, as system calls, and stand in STEPS; a call that is not there fails a test. Each is
killed before it is carried out, which is also the moment after the one before it. The host is then started again as an
operator would, and whatever was answered must be there.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from tests.fault.persistence.calls import TPM, Counted, Killer, Step, Trace
from tests.fault.persistence.operations import Operations
from tests.support.host import Host

HOLD_S = 0.04
"""How long a call waits for its kill; longer when the kill came too late."""
GRACE_S = 0.01
"""How long before that whatever was answered has to arrive."""
TRIES = 4

PCR_EXTEND = "TPM2_PCR_Extend"
"""Once for an image until the TPM is reset."""
MANAGER, KEEPER, EMBEDDED = "manager", "keeper", "embedded TPM"
_DEPTH = {MANAGER: 1, KEEPER: 2, EMBEDDED: 3}


def _steps(text: str) -> tuple[Step, ...]:
    lines = (line.split(None, 2) for line in text.strip().splitlines())
    programs = {"M": MANAGER, "K": KEEPER, "E": EMBEDDED}
    return tuple(Step(programs[program], call, file) for program, call, file in lines)


FIRST_STEPS = _steps(f"""
    M mkdir .
    M mkdir launcher
    M mkdir vault
    M mkdir peers
    M mkdir platform
    M mkdir keeper
    K mkdir keeper
    E mkdir keeper/embedded-tpm
    E write keeper/embedded-tpm/initialised.new
    E fsync keeper/embedded-tpm/initialised.new
    E rename keeper/embedded-tpm/initialised.new
    K write keeper/root.sealed.new
    K fsync keeper/root.sealed.new
    K TPM2_NV_DefineSpace {TPM}
    K link keeper/root.sealed.new
    M pwrite64 vault/vtpm.db.new*
    M fdatasync vault/vtpm.db.new*
    M ftruncate vault/vtpm.db.new*
    M fsync vault/vtpm.db.new*
    M link vault/vtpm.db.new*
""")
"""At the first start of a host alone, in their order."""
STEPS = _steps(f"""
    E fsync keeper
    E write keeper/embedded-tpm/state.new
    E fsync keeper/embedded-tpm/state.new
    E rename keeper/embedded-tpm/state.new
    E fsync keeper/embedded-tpm
    K unlink keeper/root.sealed.new
    K TPM2_NV_Write {TPM}
    K {PCR_EXTEND} {TPM}
    K fsync keeper
    K unlink keeper/root.sealed.next
    K write keeper/root.sealed.next
    K fsync keeper/root.sealed.next
    K rename keeper/root.sealed.next
    K unlink keeper/root.escrow.unconfirmed.next
    K write keeper/root.escrow.unconfirmed.next
    K fsync keeper/root.escrow.unconfirmed.next
    K rename keeper/root.escrow.unconfirmed.next
    K rename keeper/root.escrow.unconfirmed
    K unlink keeper/recovery.public.next
    K write keeper/recovery.public.next
    K fsync keeper/recovery.public.next
    K rename keeper/recovery.public.next
    M unlink peers/other-host.json.next
    M write peers/other-host.json.next
    M fsync peers/other-host.json.next
    M rename peers/other-host.json.next
    M unlink peers/other-host.json
    M fsync peers
    M unlink platform/enrolled.json.next
    M write platform/enrolled.json.next
    M fsync platform/enrolled.json.next
    M rename platform/enrolled.json.next
    M fsync platform
    M link vault/vtpm.db
    M unlink vault/vtpm.db.new*
    M fdatasync vault
    M fsync vault
    M fsync .
    K fsync .
    M fsync vault/vtpm.db-wal
    M pwrite64 vault/vtpm.db-wal
    M fdatasync vault/vtpm.db-wal
    M pwrite64 vault/vtpm.db
    M ftruncate vault/vtpm.db
    M fdatasync vault/vtpm.db
    M ftruncate vault/vtpm.db-wal
    M unlink vault/vtpm.db-wal
""")
"""Every time that the host is started, used and ended."""


class Kills:
    """One host, on which programs are killed at steps, again and again. A context manager."""

    def __init__(self) -> None:
        self.host = Host()
        self.kills = 0
        self._operations = Operations(self.host)

    def __enter__(self) -> Kills:
        return self

    def __exit__(self, *_: object) -> None:
        self._operations.close()
        self.host.end()

    def kill_at(self, step: Step, number: int = 1) -> bool:
        """Start the host, use it and end its manager; kill at a step. Whether it came to that.

        At a step of the first start alone the host is not used.
        """
        for attempt in range(TRIES):
            killer = Killer(step, number, GRACE_S)
            self._end_services(EMBEDDED if step.call == PCR_EXTEND else step.program)
            with self._trace(killer, step, HOLD_S * 4**attempt) as trace:
                self._cycle(trace, killer, use=step not in FIRST_STEPS)
            if not killer.killing.is_set():
                return False
            if step.program == MANAGER:
                # With its instances: else a vtpmd hands the next manager all that it had, and hides what was lost.
                self.host.kill("launcher")
            self.kills += 1
            if not killer.late:
                return True
            self.recover()
        raise AssertionError(f"{step}: {TRIES} kills came too late")

    def record(self) -> Counter[Step]:
        """All steps of a host's first start, its use, a manager that is killed, and another start, use and end."""
        counted = Counted()
        for program in (MANAGER, EMBEDDED):
            self._end_services(program)
            with Trace(self.host.folder, self.host.state_dir, counted) as trace:
                self.host.start(trace.attach)
                self._operations.do(lambda: False)
                if program == EMBEDDED:
                    self.host.stop_manager()
                else:
                    self.host.kill("manager")
        return counted.steps

    def recover(self) -> None:
        """Start the host as an operator would, and hold it against what was answered."""
        self.host.start()
        self._operations.check()

    def _end_services(self, program: str) -> None:
        """Kill what has to be started under the trace to be seen: each service is started by the one before it."""
        for service in ("manager", "keeper", "embedded-tpm")[: _DEPTH[program]]:
            if service != "manager" or self.host.manager_runs:
                self.host.kill(service)

    def _trace(self, killer: Killer, step: Step, hold_s: float) -> Trace:
        calls = ("write",) if step.file == TPM else (step.call,)
        file = self.host.state_dir / step.file.removesuffix("*")
        suffixes = ("", "-journal", "-wal", "-shm") if step.file.endswith("*") else ("",)
        paths = [] if step.file == TPM else [file.with_name(f"{file.name}{suffix}") for suffix in suffixes]
        return Trace(self.host.folder, self.host.state_dir, killer, calls=calls, paths=paths, hold_s=hold_s)

    def _cycle(self, trace: Trace, killer: Killer, use: bool) -> None:
        try:
            self.host.start(trace.attach)
        except AssertionError:
            if not killer.killing.is_set():
                raise
            # Reaps it: it has ended.
            self.host.kill("manager")
            return
        if use:
            self._operations.do(killer.killing.is_set)
        self.host.stop_manager()


def test_every_call_that_lasts_is_a_known_step_when_a_host_is_traced() -> None:
    with Kills() as host:
        steps = host.record()
    assert set(steps) == {*FIRST_STEPS, *STEPS}, "durable calls and the lists above differ"


@pytest.mark.timeout(400)
def test_whatever_was_answered_is_there_when_killed_at_each_kind_of_step() -> None:
    """The first steps in a row, each killed before it is taken and the next start after it; then the others."""
    left = list(FIRST_STEPS)
    kills = 0
    while left:
        with Kills() as host:
            began = len(left)
            while left and host.kill_at(left[0]):
                del left[0]
            assert len(left) < began, f"no first start comes to {left[0]}"
            host.recover()
            for step in STEPS if not left else ():
                assert host.kill_at(step), f"nothing comes to {step}"
                host.recover()
            kills += host.kills
    print(f"{kills} kills at {len(FIRST_STEPS) + len(STEPS)} kinds of steps")


@pytest.mark.soak
@pytest.mark.parametrize("step", FIRST_STEPS, ids=str)
@pytest.mark.timeout(3600)
def test_a_host_begins_when_killed_at_each_first_step(step: Step) -> None:
    for number in itertools.count(1):
        with Kills() as host:
            hit = host.kill_at(step, number)
            host.recover()
        if not hit:
            break
    print(f"{step}: {number - 1} kills")
    assert number > 1


@pytest.mark.soak
@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.timeout(7200)
def test_whatever_was_answered_is_there_when_killed_at_each_step(step: Step) -> None:
    with Kills() as host:
        host.recover()
        for number in itertools.count(1):
            hit = host.kill_at(step, number)
            host.recover()
            if not hit:
                break
    print(f"{step}: {number - 1} kills")
    assert number > 1
