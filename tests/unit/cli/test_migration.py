"""migrate and adopt: what they ask of the manager, what they print, and what they refuse to do."""

from __future__ import annotations

import json

from tests.unit.cli.conftest import Cli, on_terminal
from tests.unit.client.canned_manager import UUID_1, CannedManager


def test_vtpm_is_moved_to_the_peer_that_is_named(cli: Cli, manager: CannedManager) -> None:
    ended = cli("migrate", "web1", "--to", "host-b")
    assert (ended.status, ended.out) == (0, "web1 has moved to host-b, epoch 2\n")
    assert ended.err.startswith("Moving web1 to host-b")
    assert manager.methods() == ["POST /v1/vtpms/web1/migrate"]
    assert manager.asked[0].body == {"to": "host-b", "domain": None, "guest": "none"}
    assert json.loads(cli("migrate", "web1", "--to", "host-b", "--json").out)["right"] == "moved"


def test_what_is_on_its_way_is_shown_with_what_is_wrong(cli: Cli, manager: CannedManager) -> None:
    ended = cli("migrate", "--status")
    assert (ended.status, ended.err) == (0, "")
    head, first, second = ended.out.splitlines()
    assert head.split() == ["NAME", "UUID", "RIGHT", "PEER", "EPOCH", "PHASE", "TROUBLE"]
    assert first.split() == ["web1", str(UUID_1), "moved", "host-b", "2", "over", "-"]
    assert "web2" in second and second.endswith("undecided  host-c does not answer")
    assert [one["name"] for one in json.loads(cli("migrate", "web2", "--status", "--json").out)] == ["web2"]
    assert manager.methods() == ["GET /v1/migrations"] * 2


def test_vtpm_is_taken_back_when_its_move_is_aborted(cli: Cli, manager: CannedManager) -> None:
    ended = cli("migrate", "web1", "--abort")
    assert (ended.status, ended.out) == (0, "web1 is here, epoch 3\n")
    assert manager.methods() == ["POST /v1/vtpms/web1/migrate/abort"]


def test_vtpm_is_adopted_by_two_words_of_the_operator(cli: Cli, manager: CannedManager) -> None:
    refused = on_terminal("adopt", "web1", "--source-is-lost", typed="n\n")
    assert "web1 stays inert" in refused.out
    assert manager.asked == []
    ended = cli("adopt", "web1", "--source-is-lost", "--yes")
    assert (ended.status, ended.out) == (0, "web1 is here, epoch 2\n")
    assert manager.asked[0].body == {"source_is_lost": True}


def test_arrival_is_discarded_once_the_operator_has_said_so(cli: Cli, manager: CannedManager) -> None:
    refused = on_terminal("migrate", "web1", "--discard", typed="n\n")
    assert "web1 stays inert" in refused.out
    assert manager.asked == []
    ended = cli("migrate", "web1", "--discard", "--yes")
    assert (ended.status, ended.out) == (0, "web1 is not here, epoch 2\n")
    assert manager.methods() == ["POST /v1/vtpms/web1/migrate/discard"]


def test_status_of_a_vtpm_that_never_moved_is_an_error(cli: Cli) -> None:
    ended = cli("migrate", "web7", "--status")
    assert (ended.status, ended.out) == (3, "")
    assert "no vTPM web7 has moved" in ended.err
