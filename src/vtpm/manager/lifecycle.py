"""Life cycle of a vTPM on this host: states, what may happen in each, and what a crash leaves. Pure.

Imported by the manager alone. The crash rule of each state says what a manager that starts finds out and does.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from vtpm.errors import ConflictError
from vtpm.wire.api import LifeState


class Happening(enum.Enum):
    """What moves a vTPM from one state to another."""

    START = "start it"
    STARTED = "note that it runs"
    START_FAILED = "note that its start failed"
    STOP = "stop it"
    ENDED = "note that its instance ended"
    DIED = "note that its instance died under a guest"
    RESET = "note that its guest was reset"
    ENGINE_FAILED = "note that its TPM failed"
    EXPORT = "export it"
    MIGRATE = "migrate it"
    LEAVE = "let it leave with its guest"
    DEPART = "freeze it, as its guest leaves"
    DELETE = "delete it"


TRANSITIONS: Mapping[tuple[LifeState, Happening], LifeState] = {
    (LifeState.STOPPED, Happening.START): LifeState.STARTING,
    (LifeState.FAILED, Happening.START): LifeState.STARTING,
    (LifeState.STARTING, Happening.STARTED): LifeState.RUNNING,
    (LifeState.STARTING, Happening.START_FAILED): LifeState.STOPPED,
    (LifeState.STARTING, Happening.ENDED): LifeState.STOPPED,
    (LifeState.STARTING, Happening.DIED): LifeState.STARTING,
    (LifeState.STARTING, Happening.RESET): LifeState.STARTING,
    (LifeState.STARTING, Happening.ENGINE_FAILED): LifeState.STARTING,
    (LifeState.RUNNING, Happening.STOP): LifeState.STOPPING,
    (LifeState.FAILED, Happening.STOP): LifeState.STOPPING,
    (LifeState.RUNNING, Happening.DIED): LifeState.FAILED,
    (LifeState.RUNNING, Happening.ENGINE_FAILED): LifeState.FAILED,
    (LifeState.FAILED, Happening.DIED): LifeState.FAILED,
    (LifeState.FAILED, Happening.ENGINE_FAILED): LifeState.FAILED,
    (LifeState.FAILED, Happening.RESET): LifeState.RUNNING,
    (LifeState.RUNNING, Happening.RESET): LifeState.RUNNING,
    (LifeState.RUNNING, Happening.ENDED): LifeState.STOPPED,
    (LifeState.FAILED, Happening.ENDED): LifeState.STOPPED,
    (LifeState.STOPPING, Happening.ENDED): LifeState.STOPPED,
    (LifeState.STOPPING, Happening.DIED): LifeState.STOPPING,
    (LifeState.STOPPING, Happening.RESET): LifeState.STOPPING,
    (LifeState.STOPPING, Happening.ENGINE_FAILED): LifeState.STOPPING,
    (LifeState.STOPPED, Happening.EXPORT): LifeState.STOPPED,
    (LifeState.STOPPED, Happening.MIGRATE): LifeState.STOPPED,
    (LifeState.RUNNING, Happening.LEAVE): LifeState.RUNNING,
    (LifeState.RUNNING, Happening.DEPART): LifeState.FROZEN,
    (LifeState.STOPPED, Happening.DELETE): LifeState.STOPPED,
}

CRASH_RULES: Mapping[LifeState, str] = {
    LifeState.STOPPED: "nothing runs; an instance that the launcher nevertheless has is ended",
    LifeState.STARTING: "nobody was told that it started: an instance that the launcher has is ended, then stopped",
    LifeState.RUNNING: "an instance that the launcher has is taken up again; with none, stopped",
    LifeState.FAILED: "as running; the instance goes on failing until its guest resets",
    LifeState.STOPPING: "the instance, if any, is ended; then stopped",
    LifeState.FROZEN: "stays frozen until the move is decided: its destination is asked; its instance is taken up",
    LifeState.INERT: "stays inert until the move is decided: its source is asked; its instance is taken up",
}


def after(name: str, state: LifeState, happening: Happening) -> LifeState:
    """Return the state that follows.

    Raises:
        ConflictError: this cannot happen in this state; names the vTPM.
    """
    following = TRANSITIONS.get((state, happening))
    if following is None:
        raise ConflictError(f"vTPM {name} is {state}: cannot {happening.value}", next_step=_NEXT_STEPS.get(state, ""))
    return following


_NEXT_STEPS: Mapping[LifeState, str] = {
    LifeState.RUNNING: "Stop it first, with `vtpm stop`",
    LifeState.FAILED: "Reset its guest, or stop it first, with `vtpm stop`",
    LifeState.STARTING: "Wait until it runs",
    LifeState.STOPPING: "Wait until it is stopped",
    LifeState.FROZEN: "It is on its way to another host: vtpm migrate --status",
    LifeState.INERT: "It is on its way from another host: vtpm migrate --status",
}
