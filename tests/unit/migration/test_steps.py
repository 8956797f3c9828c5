"""A step takes effect in one order: durable first."""

from __future__ import annotations

import pytest

from vtpm.errors import StoreError
from vtpm.migration.steps import Send, Step, carry_out
from vtpm.vault.holding import CRASH_RULES, NOWHERE, Holding, Right
from vtpm.wire.migration import Ask

ASK = Send("b", Ask(bytes(16)))
HELD = Holding(Right.HELD, 1)


class Journal:
    """Notes what is recorded, or fails."""

    def __init__(self, done: list[object], *, fails: bool = False) -> None:
        self.done = done
        self.fails = fails

    def record(self, before: Holding, after: Holding, state: bytes | None) -> None:
        if self.fails:
            raise StoreError("the disk is full")
        self.done.append((before, after, state))


def test_holding_is_recorded_with_its_state_before_anything_is_sent() -> None:
    done: list[object] = []
    carry_out(NOWHERE, Step(HELD, None, (ASK, ASK), b"state"), Journal(done), done.append)
    assert done == [(NOWHERE, HELD, b"state"), ASK, ASK]


def test_nothing_is_recorded_when_the_holding_stays() -> None:
    done: list[object] = []
    carry_out(HELD, Step(HELD, None, (ASK,)), Journal(done), done.append)
    assert done == [ASK]


def test_nothing_is_sent_when_nothing_became_durable() -> None:
    done: list[object] = []
    with pytest.raises(StoreError):
        carry_out(NOWHERE, Step(HELD, None, (ASK,)), Journal(done, fails=True), done.append)
    assert done == []


def test_state_does_not_show_when_a_step_is_printed() -> None:
    assert "whole TPM" not in repr(Step(HELD, None, (ASK,), b"a whole TPM"))


def test_only_the_holder_may_run_it_and_every_right_has_a_crash_rule() -> None:
    assert [right for right in Right if Holding(right).may_run] == [Right.HELD]
    assert set(CRASH_RULES) == set(Right)
