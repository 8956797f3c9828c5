"""A vtpmd to talk to, powered off, its manager having said Hello."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.vtpmd import Vtpmd


@pytest.fixture
def vtpmd() -> Iterator[Vtpmd]:
    with Vtpmd() as vtpmd:
        vtpmd.manager.hello()
        yield vtpmd
