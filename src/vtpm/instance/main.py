"""Entry of vtpmd, for the confinement program: checks what it is given, makes its threads, serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from vtpm.engine import library
from vtpm.instance.ends import Ends
from vtpm.instance.server import InstanceServer
from vtpm.wire.instance_spec import InstanceArgs

# While there is still a file system to load it from.
library.load()


class Spec(Protocol):
    """What this module needs of a ConfinementSpec, which it must not import."""

    @property
    def target_args(self) -> Mapping[str, Any]:
        """See InstanceArgs."""
        ...


def prepare(spec: Spec, keep_fds: tuple[int, ...]) -> Callable[[], int]:
    """Make the instance ready while threads and memory maps can still be made; return what serves.

    Raises:
        VtpmError: the arguments or descriptors are not those of an instance, or libtpms cannot be used.
    """
    server = InstanceServer(InstanceArgs.from_json(spec.target_args), Ends.from_descriptors(set(keep_fds)))
    server.start_threads()
    return server.run
