"""Reads the seccomp allow-list, which is data, and turns it into rules by number.

For `steps` and tests. The list is a TOML file with one table per action: `[allow]`, and `[errno.NAME]` for
calls that are answered with that error. A key is a system call; its value says why it is there, or is a table
with `why` and `when`, a list of conditions of which all must hold: `{argument, one_of}` or `{argument,
bits_clear}`. A call named in both kinds of table is decided by `allow` first. What is not named is killed.
"""

from __future__ import annotations

import errno
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from vtpm.confine.bpf import RET_ALLOW, RET_ERRNO, BitsClear, Condition, OneOf, Rule
from vtpm.confine.spec import AllowList
from vtpm.confine.syscalls import SYSCALLS, Machine
from vtpm.errors import ConfinementError


def policy_of(allow_list: AllowList) -> str:
    """Return the text of an allow-list."""
    return Path(__file__).with_name(f"seccomp_{allow_list}.toml").read_text()


def rules_for(machine: Machine, text: str) -> dict[int, list[Rule]]:
    """Parse an allow-list.

    Args:
        machine: whose numbers to use; a call that the machine does not have is left out.
        text: the TOML document.
    Returns:
        Rules by system call number, in the document's order (put what is called most first).
    Raises:
        ConfinementError: the document is not of the form above, names an unknown call, or gives no reason for
            one.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfinementError(f"the seccomp allow-list is not TOML: {error}") from error
    rules: dict[int, list[Rule]] = {}
    for action, name, entry in _entries(document):
        if name not in SYSCALLS:
            raise ConfinementError(f"the seccomp allow-list names {name!r}, whose numbers syscalls.py does not have")
        number = getattr(SYSCALLS[name], machine.value)
        rule = Rule(action, _conditions(name, entry))
        if number is not None:
            rules.setdefault(number, []).append(rule)
    return rules


def _entries(document: Mapping[str, object]) -> Iterator[tuple[int, str, object]]:
    if not set(document) <= {"allow", "errno"}:
        raise ConfinementError("the seccomp allow-list has tables other than allow and errno")
    for name, entry in _table(document.get("allow", {}), "allow").items():
        yield RET_ALLOW, name, entry
    for code, calls in _table(document.get("errno", {}), "errno").items():
        number = getattr(errno, code, None)
        if not isinstance(number, int):
            raise ConfinementError(f"the seccomp allow-list has a table errno.{code}, which is no error's name")
        for name, entry in _table(calls, f"errno.{code}").items():
            yield RET_ERRNO | number, name, entry


def _table(value: object, name: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ConfinementError(f"{name} in the seccomp allow-list is not a table")
    return value


def _conditions(name: str, entry: object) -> tuple[Condition, ...]:
    when: object = []
    if isinstance(entry, str):
        why = entry
    else:
        table = _table(entry, name)
        why, when = str(table.get("why", "")), table.get("when", [])
        if set(table) != {"why", "when"} or not isinstance(when, list) or not when:
            raise ConfinementError(f"{name} in the seccomp allow-list needs why and a non-empty when, and nothing else")
    if not why.strip():
        raise ConfinementError(f"{name} in the seccomp allow-list has no reason")
    assert isinstance(when, list)
    return tuple(_condition(name, _table(condition, name)) for condition in when)


def _condition(name: str, table: Mapping[str, object]) -> Condition:
    match table:
        case {"argument": int(argument), "one_of": [*values]} if len(table) == 2:
            numbers = tuple(value for value in values if isinstance(value, int))
            if len(numbers) == len(values):
                return OneOf(argument, numbers)
        case {"argument": int(argument), "bits_clear": int(mask)} if len(table) == 2:
            return BitsClear(argument, mask)
    raise ConfinementError(f"a condition of {name} in the seccomp allow-list is neither one_of nor bits_clear")
