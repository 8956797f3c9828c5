"""A canned manager at a socket of the test's own, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.client.canned_manager import RUNNING, CannedManager, serve
from vtpm.client.manager_client import ManagerClient


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[CannedManager]:
    canned = CannedManager(tmp_path / "m", vtpms={"web1": RUNNING})
    with serve(canned):
        yield canned


@pytest.fixture
def client(manager: CannedManager) -> Iterator[ManagerClient]:
    with ManagerClient(manager.socket_path, timeout_s=10) as connected:
        yield connected
