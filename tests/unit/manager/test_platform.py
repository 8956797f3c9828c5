"""What the manager notes of changes that it asks the keeper for: no end of the manager leaves one out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest

from vtpm.errors import ConflictError, VtpmError
from vtpm.manager.access import Caller
from vtpm.manager.platform import PlatformService
from vtpm.recovery_key import RecoveryKey
from vtpm.vault.records import Event
from vtpm.wire.api import AllowPcrs, ConfirmRecoveryKey
from vtpm.wire.call_threads import CallThreads
from vtpm.wire.keeper import PolicyState
from vtpm.wire.keeper_client import KeeperClient

ROOT = Caller(uid=0, gid=0, is_admin=True)
PUBLIC = RecoveryKey.generate().public


class Log:
    """The audit log and a keeper; notes the order of what reaches them.

    Args:
        refusal: what the keeper answers.
        lasts: after how many of them the manager dies.
    """

    def __init__(self, refusal: VtpmError | None = None, lasts: int = 99) -> None:
        self.reached: list[str] = []
        self.events: list[Event] = []
        self._refusal = refusal
        self._lasts = lasts

    def _reach(self, what: str) -> None:
        if len(self.reached) == self._lasts:
            raise asyncio.CancelledError
        self.reached.append(what)

    async def note(self, event: Event) -> None:
        self._reach(event.kind)
        self.events.append(event)

    def _asked(self, what: str) -> PolicyState:
        self._reach(what)
        if self._refusal is not None:
            raise self._refusal
        return PolicyState("sha256:0", (), ("00" * 32,))

    def policy_allow(self, label: str, values: tuple[str, ...]) -> PolicyState:
        return self._asked("keeper")

    def policy_drop(self, label: str) -> PolicyState:
        return self._asked("keeper")

    def confirm_recovery_key(self, public_key: str) -> None:
        self._asked("keeper")


Change = Callable[[PlatformService], Coroutine[Any, Any, Any]]
CHANGES: dict[str, tuple[Change, str]] = {
    "policy_allow": (lambda service: service.allow(AllowPcrs("next", ["00" * 32]), ROOT), "policy_allowed"),
    "policy_drop": (lambda service: service.drop("next", ROOT), "policy_dropped"),
    "recovery_key_confirm": (
        lambda service: service.confirm_recovery_key(ConfirmRecoveryKey(PUBLIC.to_text()), ROOT),
        "recovery_key_confirmed",
    ),
}


async def _accept(event: Event | None) -> None:
    raise AssertionError("nothing is recovered here")


def _do(log: Log, change: Change) -> None:
    asyncio.run(change(PlatformService(cast(KeeperClient, log), CallThreads("keeper", 1), log.note, _accept)))


@pytest.mark.parametrize("what", CHANGES)
def test_intent_is_noted_before_and_outcome_after_when_the_keeper_changes_something(what: str) -> None:
    change, done = CHANGES[what]
    log = Log()
    _do(log, change)
    assert log.reached == [f"{what}_asked", "keeper", done]
    assert log.events[0].detail == log.events[1].detail != "{}"


@pytest.mark.parametrize("what", CHANGES)
def test_intent_stays_when_the_manager_dies_before_the_outcome_is_noted(what: str) -> None:
    log = Log(lasts=2)
    with pytest.raises(asyncio.CancelledError):
        _do(log, CHANGES[what][0])
    assert log.reached == [f"{what}_asked", "keeper"]


@pytest.mark.parametrize("what", CHANGES)
def test_failure_is_noted_with_its_cause_when_the_keeper_refuses(what: str) -> None:
    log = Log(ConflictError("it is so already"))
    with pytest.raises(ConflictError):
        _do(log, CHANGES[what][0])
    assert log.reached == [f"{what}_asked", "keeper", f"{what}_failed"]
    assert json.loads(log.events[1].detail)["why"] == "it is so already"
