"""Every promise of SPECIFICATION.md names tests; every test that it or the table of attacks names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SPECIFICATION.md").read_text()
ATTACKS = (ROOT / "docs" / "adversarial-tests.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", TEXT + ATTACKS)))


def _sections() -> dict[str, str]:
    parts = re.split(r"^## (\d+\. .*)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_there_are_eight_promises_each_with_a_test_or_said_to_be_missing() -> None:
    sections = _sections()
    assert len(sections) == 8
    for title, body in sections.items():
        assert "`tests/" in body or "Not kept yet" in body, title


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_named_test_exists(file: str, test: str) -> None:
    path = ROOT / file
    assert path.is_file(), file
    if test:
        functions = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
        assert test in functions, f"{file} has no {test}"
