"""An allowance gives no more than its burst at once, and fills at its rate."""

from __future__ import annotations

from vtpm.wire.allowance import Allowance


def test_no_more_than_the_burst_is_given_when_asked_at_once() -> None:
    now = 100.0
    allowance = Allowance(burst=3, per_second=0.5, clock=lambda: now)
    assert [allowance.take() for _ in range(5)] == [True, True, True, False, False]
    now += 2.0
    assert [allowance.take() for _ in range(2)] == [True, False]
    now += 1000.0
    assert [allowance.take() for _ in range(4)] == [True, True, True, False]


def test_what_was_used_beyond_what_was_left_is_owed_when_it_has_happened() -> None:
    now = 100.0
    allowance = Allowance(burst=3, per_second=0.5, clock=lambda: now)
    assert [allowance.overdraw(2), allowance.overdraw(1), allowance.overdraw(4), allowance.take()] == [0, 0, 8, False]
    now += 6.0
    assert allowance.overdraw(2) == 6
    now += 8.0
    assert [allowance.take(), allowance.take()] == [True, False]
