"""Fixtures of the keeper's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.processes import KeeperProcess, short_directory
from tests.support.swtpm import SwtpmPlatform
from vtpm.wire.keeper_client import KeeperClient

StartKeeper = Callable[..., KeeperProcess]
Connect = Callable[[KeeperProcess], KeeperClient]


@pytest.fixture(autouse=True)
def quiet_tss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSS2_LOG", "all+none")


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
def swtpm(directory: Path) -> Iterator[SwtpmPlatform]:
    """Hardware, as far as the keeper can tell, with a boot measured into PCR 0."""
    (directory / "hw").mkdir()
    with SwtpmPlatform(directory / "hw") as platform:
        platform.extend(0, "firmware")
        yield platform


@pytest.fixture
def keepers() -> Iterator[Callable[[KeeperProcess], KeeperProcess]]:
    """Take a keeper whose processes are to be ended after the test."""
    with ExitStack() as stack:

        def keep(keeper: KeeperProcess) -> KeeperProcess:
            stack.callback(keeper.stop)
            return keeper

        yield keep


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Make a client of a keeper; closed after the test."""
    with ExitStack() as stack:

        def make(keeper: KeeperProcess) -> KeeperClient:
            client = KeeperClient(keeper.run_dir)
            stack.callback(client.close)
            return client

        yield make
