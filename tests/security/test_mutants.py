"""Each check against an attack has a test that misses it: with the check alone removed, that test fails.

The table of attacks, tests and checks is docs/adversarial-tests.md. What a mutant takes away is in mutants/*.toml.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.security.mutants.runner import ROOT, Copy, Edit, Mutant, load_mutants
from tests.support.processes import short_directory

MUTANTS = load_mutants()
TABLE = (ROOT / "docs" / "adversarial-tests.md").read_text()
BY_NAME = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


@BY_NAME
def test_mutant_fits_program_and_tests_when_looked_up(mutant: Mutant) -> None:
    package = ROOT / "src" / "vtpm"
    for path, text in mutant.texts(package).items():
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(path.read_text())), path
    assert mutant.tests
    for test in mutant.tests:
        file, name = test.split("::")
        functions = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}
        assert name.partition("[")[0] in functions, test


def test_table_names_every_mutant_and_no_other_when_compared() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    named = re.findall(r"\*([a-z0-9-]+)\*", TABLE)
    assert sorted(set(named)) == sorted(mutant.name for mutant in MUTANTS)


def test_table_has_every_attack_on_one_host_when_counted() -> None:
    rows = re.findall(r"^\| (\d+) \|.*`tests/", TABLE, flags=re.MULTILINE)
    assert sorted(map(int, set(rows))) == [*range(1, 15), 25]


@pytest.fixture(scope="module")
def copy() -> Iterator[Copy]:
    """A copy on which every test passes while nothing is removed."""
    with short_directory() as folder:
        made = Copy(folder)
        whole = made.run(sorted({test for mutant in MUTANTS for test in mutant.tests}))
        assert whole.passed and not whole.failed and not whole.broken, whole.output
        yield made


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("new", ["# Nothing is removed.\n", "this is no program\n"], ids=["survivor", "broken"])
def test_no_test_counts_as_failed_when_the_change_takes_nothing_away_or_too_much(copy: Copy, new: str) -> None:
    """A mutant that survives is told, and one that cannot even be imported is no proof of anything."""
    name = "tests/unit/vault/test_rules.py::test_blank_is_refused_when_the_permit_was_used_whatever_else_is_lost"
    old = "from vtpm.vault.envelope import MAX_ENVELOPE_BYTES\n"
    edit = Edit("vault/rules.py", old, old + new)
    outcome = copy.run([name], Mutant("harmless", "nothing", (name,), (edit,)))
    assert outcome.failure(name) is None
    assert bool(outcome.broken) is ("no program" in new)
    assert copy.run([name]).passed == {name}


@pytest.mark.soak
@pytest.mark.timeout(900)
@BY_NAME
def test_named_tests_fail_when_their_check_is_removed(copy: Copy, mutant: Mutant) -> None:
    outcome = copy.run(mutant.tests, mutant)
    why = {test: outcome.failure(test) for test in mutant.tests}
    survived = [test for test, failure in why.items() if failure is None]
    assert not survived, f"without this check nothing fails: {mutant.check}\n{outcome.output}"
    for test, failure in why.items():
        print(f"without {mutant.name}: {test.partition('::')[2]}: {failure}")
