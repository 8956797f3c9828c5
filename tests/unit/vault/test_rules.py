"""Rules that hold although the root record already refuses rows that they would refuse."""

from __future__ import annotations

import dataclasses

import pytest

from tests.unit.vault.world import new_record
from vtpm.errors import ConflictError, StateError
from vtpm.tpm.types import StateKind
from vtpm.vault.records import Permit, PermitState, SavedState
from vtpm.vault.rules import check_may_run, check_never_saved, check_no_move

RECORD = new_record()
STATE = SavedState(RECORD.id, StateKind.PERMANENT, 1, 1, b"sealed")


def test_blank_is_refused_when_the_permit_was_used_whatever_else_is_lost() -> None:
    used = dataclasses.replace(RECORD, permit=Permit(PermitState.CONSUMED, bytes(16)))
    with pytest.raises(StateError, match="never made blank"):
        check_never_saved(used, [])


@pytest.mark.parametrize(("version", "states"), [(1, []), (0, [STATE]), (1, [STATE])])
def test_blank_is_refused_when_only_the_permit_says_that_nothing_was_saved(
    version: int, states: list[SavedState]
) -> None:
    check_never_saved(RECORD, [])
    with pytest.raises(StateError, match="although"):
        check_never_saved(dataclasses.replace(RECORD, state_version=version), states)


@pytest.mark.parametrize("word", ["inert", "frozen"])
def test_vtpm_does_not_run_nor_get_a_word_of_a_migration_when_another_host_may_run_it(word: str) -> None:
    check_may_run(RECORD)
    check_no_move("running")
    with pytest.raises(ConflictError, match="on its way"):
        check_may_run(dataclasses.replace(RECORD, lifecycle=word))
    with pytest.raises(ConflictError, match="by a migration alone"):
        check_no_move(word)
