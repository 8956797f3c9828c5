"""The client asks what wire/api.py says, over a real socket, and turns every failure into the right error."""

from __future__ import annotations

import os
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.unit.client.canned_manager import RUNNING, STATUS, STOPPED, VM_UUID, Asked, CannedManager, event
from vtpm import errors
from vtpm.client import manager_client
from vtpm.client.manager_client import ManagerClient
from vtpm.errors import (
    AccessDeniedError,
    ConflictError,
    NotFoundError,
    ProtocolError,
    UnavailableError,
    UsageError,
    VtpmError,
)
from vtpm.tpm.types import Make, Startup, TpmVersion
from vtpm.wire.api import MAX_VTPMS, DomainName, LifeState, ShutDown

EVERY_ERROR = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, VtpmError)]


def test_status_and_list_are_read_when_the_manager_answers(client: ManagerClient) -> None:
    assert client.status() == STATUS
    assert client.list() == [RUNNING]


def test_create_sends_all_it_was_told_when_nothing_is_left_to_default(
    client: ManagerClient, manager: CannedManager
) -> None:
    made = client.create("db", TpmVersion.V1_2, DomainName.XEN, VM_UUID, Make.SWTPM)
    assert (made.name, made.tpm_version, made.domain, made.vm_uuid) == ("db", "1.2", "xen", VM_UUID)
    body = {"name": "db", "tpm_version": "1.2", "domain": "xen", "vm_uuid": str(VM_UUID), "make": "swtpm"}
    assert manager.asked == [Asked("POST", "/v1/vtpms", body)]


def test_create_leaves_the_vm_open_when_none_is_named(client: ManagerClient, manager: CannedManager) -> None:
    assert client.create("db").vm_uuid is None
    assert manager.asked[0].body == {
        "name": "db",
        "tpm_version": "2.0",
        "domain": "process",
        "vm_uuid": None,
        "make": "libtpms",
    }


def test_a_vtpm_starts_stops_and_goes_when_asked(client: ManagerClient, manager: CannedManager) -> None:
    manager.vtpms["web1"] = STOPPED
    assert client.start("web1", Startup.CLEAR).state is LifeState.RUNNING
    assert client.show("web1").tcti == RUNNING.tcti
    assert client.stop("web1").state is LifeState.STOPPED
    client.delete("web1")
    with pytest.raises(NotFoundError):
        client.show("web1")
    assert manager.methods() == [
        "POST /v1/vtpms/web1/start",
        "GET /v1/vtpms/web1",
        "POST /v1/vtpms/web1/stop",
        "DELETE /v1/vtpms/web1",
        "GET /v1/vtpms/web1",
    ]
    assert manager.asked[0].body == {"startup": "clear"}


def test_shutdown_says_what_it_stopped_when_it_has(client: ManagerClient) -> None:
    assert client.shutdown() == ShutDown(["web1"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
@example("../x")
@example("..")
@example("a/../../status")
@example("a?b#c")
@example("%2e%2E")
@example("\n")
def test_a_name_reaches_the_manager_as_it_is_when_it_is_anything(
    client: ManagerClient, manager: CannedManager, name: str
) -> None:
    manager.asked.clear()
    with pytest.raises(NotFoundError):
        client.show(name)
    prefix, quoted = manager.asked[0].path.rsplit("/", 1)
    assert (prefix, urllib.parse.unquote(quoted)) == ("/v1/vtpms", name)


@pytest.mark.parametrize("name", ["", "\udcff"])
def test_a_name_is_refused_before_it_is_sent_when_no_path_can_hold_it(
    client: ManagerClient, manager: CannedManager, name: str
) -> None:
    for call in (client.show, client.create, client.start, client.stop, client.delete):
        with pytest.raises(UsageError):
            call(name)
    assert manager.asked == []


@pytest.mark.parametrize("kind", EVERY_ERROR)
def test_the_error_is_raised_as_its_class_when_the_manager_reports_its_code(
    client: ManagerClient, manager: CannedManager, kind: type[VtpmError]
) -> None:
    manager.fail_with(kind.code)
    with pytest.raises(VtpmError) as caught:
        client.start("web1")
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.next_step) == ("web1 is broken", "Mend it")


def test_the_root_error_is_raised_when_the_code_is_not_known(client: ManagerClient, manager: CannedManager) -> None:
    manager.fail_with("lunar")
    with pytest.raises(VtpmError, match="web1 is broken") as caught:
        client.status()
    assert type(caught.value) is VtpmError


@pytest.mark.parametrize(
    ("http_status", "answer"),
    [
        (200, b"<html>"),
        (200, b""),
        (200, b"\xff"),
        (200, b"[" * 100_000),
        (200, b"1" * 10_000),
        (200, {}),
        (200, []),
        (404, {"detail": "Not Found"}),
        (404, b""),
        (500, b"Internal Server Error"),
        (302, {"code": "usage", "message": "moved"}),
    ],
)
def test_the_answer_is_refused_when_it_is_not_the_managers(
    client: ManagerClient, manager: CannedManager, http_status: int, answer: object
) -> None:
    manager.answer_with(http_status, answer)
    with pytest.raises(ProtocolError):
        client.status()


def test_the_answer_is_refused_when_it_is_too_large(
    client: ManagerClient, manager: CannedManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager_client, "MAX_REPLY_BYTES", 1000)
    manager.answer_with(200, b" " * 1001)
    with pytest.raises(ProtocolError, match="over 1000 bytes"):
        client.status()
    # The connection is fit for use again.
    manager.answer = None
    monkeypatch.undo()
    assert client.status() == STATUS


def test_it_is_unavailable_when_the_answer_breaks_off(client: ManagerClient, manager: CannedManager) -> None:
    manager.answer_with(200, b"[]", length=100)
    with pytest.raises(UnavailableError, match="broke off"):
        client.list()


def test_it_is_unavailable_when_no_answer_comes_in_time(manager: CannedManager) -> None:
    manager.answer = (0, b"", 0)
    with (
        ManagerClient(manager.socket_path, timeout_s=0.05) as client,
        pytest.raises(UnavailableError, match="did not answer"),
    ):
        client.list()


def test_it_is_unavailable_with_path_cause_and_next_step_when_there_is_no_socket(tmp_path: Path) -> None:
    with ManagerClient(tmp_path / "absent") as client, pytest.raises(UnavailableError) as caught:
        client.status()
    assert caught.value.message == f"no manager answers at {tmp_path}/absent: No such file or directory"
    assert "systemctl start vtpm-managerd" in caught.value.next_step


def test_it_is_unavailable_when_nobody_listens_at_the_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(tmp_path / "m"))
    with ManagerClient(tmp_path / "m") as client, pytest.raises(UnavailableError, match="Connection refused"):
        client.status()


def test_it_is_unavailable_when_the_path_is_too_long_for_a_socket(tmp_path: Path) -> None:
    with ManagerClient(tmp_path / ("x" * 200)) as client, pytest.raises(UnavailableError, match="too long"):
        client.status()


@contextmanager
def _without_roots_power() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_access_is_denied_when_the_socket_is_not_the_callers_to_open(manager: CannedManager) -> None:
    manager.socket_path.chmod(0)
    with (
        ManagerClient(manager.socket_path) as client,
        _without_roots_power(),
        pytest.raises(AccessDeniedError, match="may not use the manager"),
    ):
        client.status()


def test_the_manager_is_asked_directly_when_the_environment_names_a_proxy(
    manager: CannedManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with ManagerClient(manager.socket_path) as client:
        assert client.status() == STATUS


def test_all_events_come_once_and_in_order_when_they_fill_several_pages(
    client: ManagerClient, manager: CannedManager
) -> None:
    manager.events = [event(number) for number in range(1, 251)]
    assert [one.id for one in client.all_events()] == list(range(1, 251))
    assert [one.id for one in client.events(after=10, limit=3)] == [11, 12, 13]


def test_following_goes_on_with_events_when_they_happen_later(client: ManagerClient, manager: CannedManager) -> None:
    manager.events = [event(1)]
    following = client.follow_events()
    assert next(following) == event(1)
    timer = threading.Timer(0.02, manager.add_event, [event(2)])
    timer.start()
    assert next(following) == event(2)
    timer.join()


def test_following_ends_with_an_error_when_the_manager_goes_round_in_circles(
    client: ManagerClient, manager: CannedManager
) -> None:
    manager.answer_with(200, [event(3)])
    following = client.follow_events()
    assert next(following) == event(3)
    with pytest.raises(ProtocolError, match="after 3"):
        next(following)


def test_a_conflict_is_raised_when_the_name_is_taken(client: ManagerClient) -> None:
    with pytest.raises(ConflictError, match="web1 exists already"):
        client.create("web1")


def test_all_vtpms_are_listed_when_there_are_more_than_one_answer_holds(
    client: ManagerClient, manager: CannedManager
) -> None:
    for count in (MAX_VTPMS - 1, MAX_VTPMS, 2 * MAX_VTPMS + 5):
        names = [f"vm{number:04}" for number in range(count)]
        manager.vtpms = {name: replace(RUNNING, name=name) for name in names}
        assert [vtpm.name for vtpm in client.list()] == names


def test_list_is_refused_when_the_manager_gives_the_same_page_again(
    client: ManagerClient, manager: CannedManager
) -> None:
    manager.answer_with(200, [replace(RUNNING, name=f"vm{number:04}") for number in range(MAX_VTPMS)])
    with pytest.raises(ProtocolError, match="not in order"):
        client.list()
