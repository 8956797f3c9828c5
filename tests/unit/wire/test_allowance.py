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


def test_nothing_is_used_up_when_more_is_asked_for_than_is_left() -> None:
    allowance = Allowance(burst=3, per_second=0.5, clock=lambda: 100.0)
    assert [allowance.take(4), allowance.take(2), allowance.take(2), allowance.take()] == [False, True, False, True]
