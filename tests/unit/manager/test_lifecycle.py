"""The life cycle's table: every state is left, every pair is decided, refusals name the vTPM."""

from __future__ import annotations

import pytest

from vtpm.errors import ConflictError
from vtpm.manager.lifecycle import CRASH_RULES, TRANSITIONS, Happening, after
from vtpm.wire.api import LifeState

LIVE = [LifeState.STARTING, LifeState.RUNNING, LifeState.STOPPING, LifeState.FAILED]


def test_every_state_has_a_crash_rule() -> None:
    assert set(CRASH_RULES) == set(LifeState)


@pytest.mark.parametrize("state", LIVE)
def test_end_of_the_instance_leads_to_stopped_when_it_may_have_one(state: LifeState) -> None:
    assert after("web1", state, Happening.ENDED) is LifeState.STOPPED


@pytest.mark.parametrize("state", LIVE)
def test_death_of_the_instance_never_leads_to_running(state: LifeState) -> None:
    assert after("web1", state, Happening.DIED) is not LifeState.RUNNING or state is LifeState.STARTING


def test_only_a_reset_leads_from_failed_to_running() -> None:
    ways = [
        h
        for (state, h), following in TRANSITIONS.items()
        if (state, following) == (LifeState.FAILED, LifeState.RUNNING)
    ]
    assert ways == [Happening.RESET]


@pytest.mark.parametrize("state", list(LifeState))
@pytest.mark.parametrize("happening", list(Happening))
def test_what_is_not_in_the_table_is_refused_by_name(state: LifeState, happening: Happening) -> None:
    if (state, happening) in TRANSITIONS:
        assert after("web1", state, happening) is TRANSITIONS[state, happening]
    else:
        with pytest.raises(ConflictError, match="web1"):
            after("web1", state, happening)


def test_nothing_is_deleted_while_it_may_run() -> None:
    deletable = {state for state, happening in TRANSITIONS if happening is Happening.DELETE}
    assert deletable == {LifeState.STOPPED}
