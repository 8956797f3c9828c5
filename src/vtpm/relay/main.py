"""Entry of vtpm-relay, for the confinement program: checks what it is given, says HELLO, relays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from vtpm.relay.ends import RelayEnds
from vtpm.relay.relay import Relay
from vtpm.wire.instance_spec import InstanceArgs


class Spec(Protocol):
    """What this module needs of a ConfinementSpec, which it must not import."""

    @property
    def target_args(self) -> Mapping[str, Any]:
        """See InstanceArgs; the virtual machine hears of them by HELLO."""
        ...


def prepare(spec: Spec, keep_fds: tuple[int, ...]) -> Callable[[], int]:
    """Make the relay ready while memory maps can still be made; return what relays.

    Raises:
        VtpmError: the arguments or descriptors are not those of a relay.
    """
    return Relay(InstanceArgs.from_json(spec.target_args), RelayEnds.from_descriptors(set(keep_fds))).run
