"""A vtpmd to talk to, powered off, its manager having said Hello: a process, in a machine, of another make."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.relayed import ForeignVtpmd, RelayedVtpmd
from tests.support.vtpmd import Vtpmd

KINDS = {"process": Vtpmd, "relayed": RelayedVtpmd, "swtpm": ForeignVtpmd}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def vtpmd(request: pytest.FixtureRequest) -> Iterator[Vtpmd]:
    with request.param() as vtpmd:
        vtpmd.manager.hello()
        yield vtpmd
