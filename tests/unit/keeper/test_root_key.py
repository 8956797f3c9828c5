"""Sealing a recovered root key again, with a platform TPM that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from vtpm.errors import PlatformTpmError
from vtpm.keeper.root_key import NewRoot, seal_again
from vtpm.platform_tpm.pcrs import DEFAULT_PCRS
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.platform_tpm.root_policy import ZeroPcrs
from vtpm.secret import Secret


class FailingTpm:
    """Cannot say which indexes it has; notes whatever else is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def find_indexes(self, root: Secret) -> Any:
        raise PlatformTpmError("the platform TPM cannot look for NV indexes: no answer within 20 s")

    def __getattr__(self, name: str) -> Any:
        self.asked.append(name)
        raise PlatformTpmError(f"it was asked to {name}")


def test_no_index_is_made_when_the_tpm_fails_while_the_old_ones_are_looked_for(tmp_path: Path) -> None:
    tpm = FailingTpm()
    with pytest.raises(PlatformTpmError, match="cannot look for NV indexes"):
        seal_again(tmp_path, cast(PlatformTpm, tpm), Secret(bytes(32)), NewRoot(DEFAULT_PCRS, ZeroPcrs.REFUSE))
    assert tpm.asked == []
    assert list(tmp_path.iterdir()) == []
