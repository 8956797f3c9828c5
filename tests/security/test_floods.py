"""Adversarial test 25: a vTPM that saves without pause, and creations and deletions, beside siblings that write calmly.

That each waiting sibling is served between two saves of the flooder is shown without a clock in
tests/unit/vault/test_anchoring.py; `python -m bench flood` measures how much longer the siblings wait.
"""

from __future__ import annotations

import pytest
from bench.flood import flood

from vtpm.vault.anchor import AnchorMode


@pytest.mark.timeout(180)
@pytest.mark.parametrize("mode", list(AnchorMode))
def test_siblings_are_answered_when_one_vtpm_and_the_api_are_flooded(mode: AnchorMode) -> None:
    """Every save of everybody succeeds within its patience, and the flood was one."""
    seen = flood(mode, turns=2, turn_s=3.0)
    assert seen.saves >= seen.siblings * 10
    assert seen.floods > seen.saves / seen.siblings / 2
    assert seen.creations > 0
