"""Fixtures of the platform TPM's contract: Debian's swtpm in the place of hardware, and the embedded TPM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import EmbeddedTpmProcess, short_directory
from tests.support.swtpm import SwtpmPlatform
from vtpm.platform_tpm.platform_tpm import PlatformTpm

Tpm = SwtpmPlatform | EmbeddedTpmProcess
KINDS = {"swtpm": SwtpmPlatform, "embedded": EmbeddedTpmProcess}


@pytest.fixture(autouse=True)
def quiet_tss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSS2_LOG", "all+none")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> type[Tpm]:
    return KINDS[request.param]


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
def tpm(kind: type[Tpm], directory: Path) -> Iterator[Tpm]:
    """Powered on, and nothing measured."""
    with kind(directory) as started:
        yield started


@pytest.fixture
def platform(tpm: Tpm) -> Iterator[PlatformTpm]:
    """A connection to it."""
    with PlatformTpm(tpm.tcti) as connected:
        yield connected
