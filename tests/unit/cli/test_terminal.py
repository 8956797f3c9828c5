"""On a real terminal: questions, their answers, tables and warnings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.cli.conftest import on_terminal
from tests.unit.client.canned_manager import STATUS, STOPPED, CannedManager


@pytest.mark.parametrize(
    ("typed", "status", "kept"),
    [("y\n", 0, False), ("n\n", 2, True), ("\n", 2, True), ("\x03", 130, True), ("\x04", 2, True)],
    ids=["yes", "no", "enter", "ctrl-c", "ctrl-d"],
)
def test_delete_does_as_answered_when_it_asks(manager: CannedManager, typed: str, status: int, kept: bool) -> None:
    # Python's input() can miss an interrupt in the moment before it reads; a user, too, types it again.
    ended = on_terminal("delete", "web1", typed=typed, typed_again=typed if typed == "\x03" else "")
    assert "Delete web1 for ever" in ended.out
    assert (ended.status, "web1" in manager.vtpms) == (status, kept)
    assert "Traceback" not in ended.out


def test_shutdown_asks_when_vtpms_are_running(manager: CannedManager) -> None:
    ended = on_terminal("shutdown", typed="n\n")
    assert "Running: web1" in ended.out
    assert ended.status == 2
    assert "POST /v1/shutdown" not in manager.methods()


def test_shutdown_asks_nothing_when_nothing_runs(manager: CannedManager) -> None:
    manager.vtpms["web1"] = STOPPED
    assert on_terminal("shutdown").status == 0
    assert manager.methods()[-1] == "POST /v1/shutdown"


def test_status_warns_in_a_panel_when_the_root_key_is_unprotected(manager: CannedManager) -> None:
    manager.status = replace(STATUS, warnings=["[red]not markup[/red]"])
    ended = on_terminal("status")
    assert ended.status == 0
    assert "WARNING" in ended.out
    assert "UNPROTECTED" in ended.out
    assert "[red]not markup[/red]" in ended.out
    assert "╭" in ended.out


def test_list_is_a_table_when_stdout_is_a_terminal(manager: CannedManager) -> None:
    ended = on_terminal("list")
    assert "┃" in ended.out
    assert "web1" in ended.out
