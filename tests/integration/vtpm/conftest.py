"""Fixtures of tests over a whole host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.installation import Installation
from tests.support.processes import short_directory
from tests.support.swtpm import SwtpmPlatform, booted_platform


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[SwtpmPlatform]:
    """See booted_platform."""
    monkeypatch.setenv("TSS2_LOG", "all+none")
    with booted_platform() as platform:
        yield platform


@pytest.fixture
def installed() -> Iterator[Installation]:
    """A copy of the program that a test may change."""
    with short_directory() as folder:
        yield Installation(folder)
