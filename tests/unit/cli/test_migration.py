"""migrate and adopt: what they ask of the manager, what they print, and what they refuse to do."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.unit.cli.conftest import Cli, on_terminal
from tests.unit.client.canned_manager import UUID_1, CannedManager
from vtpm.cli import migration
from vtpm.client.live_migration import LiveMigrationError, Whereabouts


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


def test_guest_is_let_leave_when_something_else_migrates_it(cli: Cli, manager: CannedManager) -> None:
    ended = cli("migrate", "web1", "--to", "host-b", "--live")
    assert ended.status == 0
    assert "may leave for host-b with its guest" in ended.out
    assert manager.asked[0].body == {"to": "host-b", "domain": None, "guest": "foreign"}


def test_instance_waits_for_the_vtpm_that_is_to_arrive(cli: Cli, manager: CannedManager) -> None:
    ended = cli("receive", "web1", "--uuid", str(UUID_1), "--owner", "7:8", "--domain", "qemu")
    assert (ended.status, ended.out.startswith("web1 is expected; for QEMU: -chardev socket,path=")) == (0, True)
    (asked,) = manager.asked
    assert (asked.method, asked.path) == ("POST", "/v1/vtpms/web1/receive")
    assert asked.body == {
        "uuid": str(UUID_1), "tpm_version": "2.0", "domain": "qemu", "vm_uuid": None, "owner": [7, 8]
    }  # fmt: skip
    assert json.loads(cli("receive", "web1", "--uuid", str(UUID_1), "--json").out)["name"] == "web1"


def test_owner_is_two_numbers(cli: Cli, manager: CannedManager) -> None:
    for owner in ("root", "7", "7:", ":8", "-1:8"):
        ended = cli("receive", "web1", "--uuid", str(UUID_1), "--owner", owner)
        assert ended.status == 2
        assert "is no owner" in ended.err
    assert manager.asked == []


def test_words_about_a_guest_are_refused_when_they_do_not_fit(cli: Cli, manager: CannedManager) -> None:
    to = ("migrate", "web1", "--to", "host-b")
    monitors = ("--qmp", "/a", "--peer-qmp", "/b", "--uri", "tcp:c:1")
    for words in (
        (*to, "--live", *monitors),
        (*to, *monitors[:2]),
        (*to, *monitors[:4]),
        (*to, *monitors[2:]),
        ("migrate", "web1", "--live"),
        ("migrate", "web1", "--abort", "--live"),
        ("migrate", "web1", "--status", *monitors),
    ):
        assert cli(*words).status == 2, words
    assert manager.asked == []


def test_permission_to_leave_is_taken_back_when_the_guest_stays(
    cli: Cli, manager: CannedManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stays(name: str, *way: str, departing: Callable[[], None], **_: object) -> None:
        assert (name, way) == ("web1", ("/a", "/b", "tcp:c:1"))
        departing()
        raise LiveMigrationError("QEMU says no", Whereabouts.SOURCE)

    monkeypatch.setattr(migration, "drive_guest", stays)
    ended = cli("migrate", "web1", "--to", "host-b", "--qmp", "/a", "--peer-qmp", "/b", "--uri", "tcp:c:1")
    assert ended.status == LiveMigrationError.exit_status
    assert "QEMU says no" in ended.err
    assert manager.methods() == [
        "GET /v1/vtpms/web1",
        "POST /v1/vtpms/web1/migrate",
        "POST /v1/vtpms/web1/migrate/abort",
    ]
    assert manager.asked[1].body["guest"] == "driven"


@pytest.mark.parametrize("whereabouts", [Whereabouts.BETWEEN, Whereabouts.DESTINATION, Whereabouts.UNKNOWN])
def test_nothing_is_taken_back_when_the_guest_may_have_gone(
    cli: Cli, manager: CannedManager, monkeypatch: pytest.MonkeyPatch, whereabouts: Whereabouts
) -> None:
    def gone(*_: str, **__: object) -> None:
        raise LiveMigrationError("a monitor is lost", whereabouts)

    monkeypatch.setattr(migration, "drive_guest", gone)
    assert cli("migrate", "web1", "--to", "host-b", "--qmp", "/a", "--peer-qmp", "/b", "--uri", "tcp:c:1").status == 16
    assert manager.methods() == ["GET /v1/vtpms/web1"]


def test_release_is_told_when_the_guest_has_arrived(
    cli: Cli, manager: CannedManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moves(*_: str, arrived: Callable[[], None], **__: object) -> None:
        arrived()

    monkeypatch.setattr(migration, "drive_guest", moves)
    ended = cli("migrate", "web1", "--to", "host-b", "--qmp", "/a", "--peer-qmp", "/b", "--uri", "tcp:c:1")
    assert (ended.status, ended.out) == (0, "web1 has moved to host-b, epoch 2\n")
    assert manager.methods()[-1] == "POST /v1/vtpms/web1/migrate/arrived"
