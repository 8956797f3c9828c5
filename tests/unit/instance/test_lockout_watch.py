"""A TPM is looked at where it may be locked, and nowhere else; what is seen is reported when it changes."""

from __future__ import annotations

import pytest

from tests.unit.tpm.test_lockout import answer, properties
from vtpm.instance.lockout_watch import LockoutWatch, Seen
from vtpm.tpm.lockout import Lockout

CLEAR, NV_READ, LOCK_RESET, PARAMETERS, STARTUP, SHUTDOWN = 0x126, 0x14E, 0x139, 0x13A, 0x144, 0x145
AUTH_FAIL, BAD_AUTH, RC_LOCKOUT, RETRY = 0x98E, 0x9A2, 0x921, 0x922
FREE = Lockout(False, 1, 3, 1000)
LOCKED = Lockout(True, 3, 3, 1000)


class World:
    """A watch, the clock it reads and what it reported."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.reported: list[Seen] = []
        self.watch = LockoutWatch(self.reported.append, lambda: self.now_s)

    def see(self, lockout: Lockout) -> None:
        self.watch.take(answer(properties(lockout)))


@pytest.fixture
def world() -> World:
    return World()


def test_nothing_is_suspected_when_nothing_failed(world: World) -> None:
    world.see(FREE)
    for code in (STARTUP, SHUTDOWN, CLEAR, LOCK_RESET, PARAMETERS, NV_READ):
        assert not world.watch.suspects(code, 0)
    assert not world.watch.suspects(NV_READ, BAD_AUTH)
    assert not world.watch.suspects(NV_READ, RETRY)
    assert not world.watch.suspects(STARTUP, 0x100)


@pytest.mark.parametrize("result", [AUTH_FAIL, RC_LOCKOUT])
def test_lock_is_suspected_when_an_authorisation_failed_or_was_not_tried(world: World, result: int) -> None:
    world.see(FREE)
    assert world.watch.suspects(NV_READ, result)


def test_first_startup_is_looked_after_when_the_past_is_not_known(world: World) -> None:
    assert world.watch.suspects(STARTUP, 0)
    world.see(FREE)
    assert not world.watch.suspects(STARTUP, 0)


def test_startup_is_looked_after_when_power_was_lost_or_the_tpm_was_locked(world: World) -> None:
    world.see(FREE)
    world.watch.power_lost()
    assert world.watch.suspects(STARTUP, 0)
    assert not world.watch.suspects(STARTUP, 0x100)
    world.see(LOCKED)
    assert world.watch.suspects(STARTUP, 0)


def test_locked_tpm_is_looked_at_when_something_may_have_freed_it_alone(world: World) -> None:
    world.see(LOCKED)
    for code in (CLEAR, LOCK_RESET, PARAMETERS):
        assert world.watch.suspects(code, 0)
    # It says what is known.
    assert not world.watch.suspects(NV_READ, RC_LOCKOUT)
    assert not world.watch.suspects(NV_READ, 0)


def test_each_change_is_reported_once_with_the_time_it_was_first_seen(world: World) -> None:
    world.see(FREE)
    assert world.reported == []
    world.see(LOCKED)
    world.now_s = 250.9
    world.see(LOCKED)
    assert world.reported == [Seen(LOCKED, 100)]
    world.see(FREE)
    world.see(LOCKED)
    assert world.reported == [Seen(LOCKED, 100), Seen(FREE, 0), Seen(LOCKED, 250)]
    world.watch.tell()
    assert world.reported[-1] == world.watch.seen == Seen(LOCKED, 250)


def test_all_stays_as_it_was_when_the_tpm_does_not_tell(world: World) -> None:
    world.watch.take(bytes.fromhex("8001 0000000a 00000100"))
    assert world.watch.suspects(STARTUP, 0)
    world.see(LOCKED)
    world.watch.take(bytes.fromhex("8001 0000000a 00000100"))
    assert world.watch.seen == Seen(LOCKED, 100)
