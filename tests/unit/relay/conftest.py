"""A relay to talk to, behind which a virtual machine has said READY."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.relay import LoneRelay


@pytest.fixture
def relay() -> Iterator[LoneRelay]:
    with LoneRelay() as relay:
        relay.make_ready()
        yield relay
