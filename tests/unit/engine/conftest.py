"""State of one manufactured TPM of each version; 1.2 takes an RSA key, so it is made once."""

from __future__ import annotations

import pytest

from tests.unit.engine.isolated import in_process
from tests.unit.engine.memory import manufacture
from vtpm.tpm.types import StateKind, TpmVersion

State = dict[StateKind, bytes]


@pytest.fixture(scope="session")
def new_20() -> State:
    state: State = in_process(manufacture, TpmVersion.V2_0)
    return state


@pytest.fixture(scope="session")
def new_12() -> State:
    state: State = in_process(manufacture, TpmVersion.V1_2, timeout_s=90)
    return state
