"""The bindings call Xen's libraries as their C headers say, and turn what they answer into values and errors.

The libraries are ours (tests/support/xen_stub.c), for there is no Xen here; each argument goes through C.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vtpm.errors import UnavailableError
from vtpm.guest_link.xen import libraries
from vtpm.guest_link.xen.event_channels import LibEventChannels
from vtpm.guest_link.xen.grants import LibGrants
from vtpm.guest_link.xen.libxen import open_hypervisor
from vtpm.guest_link.xen.xenstore import LibXenstore

ROOT = Path(__file__).parents[3]
NAMES = ("libxenstore.so.4", "libxenevtchn.so.1", "libxengnttab.so.1")
TRANSACTION = 0xFFFFFFF7


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("xen") / "libxenstub.so"
    source = ROOT / "tests" / "support" / "xen_stub.c"
    subprocess.run(["gcc", "-Wall", "-Werror", "-O1", "-shared", "-fPIC", "-o", built, source], check=True, timeout=60)
    return built


class Stub:
    """The library from the other side."""

    def __init__(self, path: Path) -> None:
        self.lib: Any = ctypes.CDLL(str(path))
        self.lib.stub_reset()

    def log(self) -> list[str]:
        """What was called since the last time."""
        log = (ctypes.c_char * 65536).in_dll(self.lib, "stub_log")
        lines = log.value.decode().splitlines()
        log.value = b""
        return lines

    def put(self, path: str, value: bytes = b"") -> None:
        self.lib.stub_put(path.encode(), value, len(value))

    def fail(self, number: int) -> None:
        self.set("stub_fail", number)

    def set(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self.lib, name).value = value

    @property
    def handles(self) -> int:
        return ctypes.c_int.in_dll(self.lib, "stub_handles").value


@pytest.fixture
def stub(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    made = Stub(library)
    real = ctypes.CDLL

    def found(name: str | None, **options: bool) -> ctypes.CDLL:
        return real(str(library) if name in NAMES else name, **options)

    monkeypatch.setattr(libraries.ctypes, "CDLL", found)
    libraries.load.cache_clear()
    yield made
    libraries.load.cache_clear()


@pytest.fixture
def xenstore(stub: Stub) -> Iterator[LibXenstore]:
    with LibXenstore() as made:
        stub.log()
        yield made
    assert stub.handles == 0


# -- loading --------------------------------------------------------------------------------------------------------
def test_nothing_of_xen_is_loaded_when_the_modules_are_imported() -> None:
    script = (
        "import vtpm.guest_link.xen.backend, vtpm.guest_link.xen.libxen\n"
        "print('libxen' in open('/proc/self/maps').read().replace('libxen.', ''))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, timeout=30, capture_output=True, text=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("name", NAMES)
def test_library_and_next_step_are_named_when_it_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, **options: bool) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(libraries.ctypes, "CDLL", missing)
    libraries.load.cache_clear()
    with pytest.raises(UnavailableError, match=name) as error:
        libraries.load(name)
    package = {"libxenstore.so.4": "libxenstore4"}.get(name, name.replace(".so.", ""))
    assert f"install {package};" in error.value.next_step


def test_function_is_named_when_a_library_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ctypes.CDLL
    monkeypatch.setattr(libraries.ctypes, "CDLL", lambda name, **options: real(None, **options))
    libraries.load.cache_clear()
    with pytest.raises(UnavailableError, match="xs_open"):
        libraries.load("libxenstore.so.4")
    libraries.load.cache_clear()


@pytest.mark.parametrize(
    ("service", "named"), [(LibXenstore, "xenbus"), (LibEventChannels, "evtchn"), (LibGrants, "gntdev")]
)
def test_what_cannot_be_opened_and_where_it_must_run_are_named_when_this_is_no_xen_domain(
    stub: Stub, service: type, named: str
) -> None:
    stub.fail(errno.ENOENT)
    with pytest.raises(UnavailableError, match="No such file or directory") as error:
        service()
    assert f"/dev/xen/{named}" in error.value.next_step
    assert "Xen domain" in error.value.next_step


def test_all_three_are_closed_when_the_hypervisor_is(stub: Stub) -> None:
    with open_hypervisor() as xen:
        assert stub.handles == 3
        assert xen.xenstore.fileno() == 12345
    assert stub.handles == 0
    assert stub.log() == ["xs_open 0", "evtchn_open 0 0", "gnttab_open 0 0"]


# -- xenstore -------------------------------------------------------------------------------------------------------
def test_value_is_returned_whole_when_it_has_any_bytes(xenstore: LibXenstore, stub: Stub) -> None:
    for value in (b"", b"1", b"a\0b\xff"):
        stub.put("backend/x", value)
        assert xenstore.read("backend/x") == value
    assert stub.log()[-1] == "read 0 backend/x"


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES])
def test_there_is_nothing_when_a_node_is_not_there_or_may_not_be_read(
    xenstore: LibXenstore, stub: Stub, number: int
) -> None:
    for call in (xenstore.read, xenstore.children, xenstore.remove):
        stub.fail(number)
        assert not call("backend/x")


def test_error_says_what_was_asked_when_xenstore_is_lost(xenstore: LibXenstore, stub: Stub) -> None:
    calls = [
        lambda: xenstore.read("backend/x"),
        lambda: xenstore.children("backend/x"),
        lambda: xenstore.remove("backend/x"),
        lambda: xenstore.watch("backend/x", "t"),
        lambda: xenstore.unwatch("backend/x", "t"),
    ]
    for call in calls:
        stub.fail(errno.EPIPE)
        with pytest.raises(UnavailableError, match="backend/x: Broken pipe"):
            call()
    stub.fail(errno.EBADF)
    with pytest.raises(UnavailableError, match="an event: Bad file"):
        xenstore.event()


def test_names_below_are_returned_when_there_are_some(xenstore: LibXenstore, stub: Stub) -> None:
    for path in ("backend", "backend/7", "backend/7/0", "backend/12"):
        stub.put(path)
    assert xenstore.children("backend") == ["7", "12"]
    assert list(xenstore.children("backend/12")) == []


def test_events_come_in_order_and_then_none_when_asked(xenstore: LibXenstore, stub: Stub) -> None:
    stub.lib.stub_event(b"backend/vtpm/7", b"backends")
    stub.lib.stub_event(b"/local/\xff", b"frontend")
    assert [xenstore.event() for _ in range(3)] == [("backend/vtpm/7", "backends"), ("/local/\\xff", "frontend"), None]


def test_keys_are_written_in_one_transaction_and_in_order_when_the_directory_is_there(
    xenstore: LibXenstore, stub: Stub
) -> None:
    stub.put("backend/7")
    assert xenstore.update("backend/7", {"ready": b"1", "state": b"4"}) is True
    assert stub.log() == [
        "start",
        f"read {TRANSACTION} backend/7",
        f"write {TRANSACTION} backend/7/ready 1",
        f"write {TRANSACTION} backend/7/state 4",
        f"end {TRANSACTION} 0",
    ]
    assert xenstore.read("backend/7/state") == b"4"


def test_nothing_is_written_when_the_directory_is_gone(xenstore: LibXenstore, stub: Stub) -> None:
    assert xenstore.update("backend/7", {"state": b"4"}) is False
    assert stub.log() == ["start", f"read {TRANSACTION} backend/7", f"end {TRANSACTION} 1"]


def test_keys_are_written_again_when_others_changed_them_meanwhile(xenstore: LibXenstore, stub: Stub) -> None:
    stub.put("backend/7")
    stub.set("stub_conflicts", 2)
    assert xenstore.update("backend/7", {"state": b"4"}) is True
    assert stub.log().count("start") == 3
    stub.set("stub_conflicts", 1000)
    with pytest.raises(UnavailableError, match="others changed it 100 times"):
        xenstore.update("backend/7", {"state": b"5"})
    assert xenstore.read("backend/7/state") == b"4"


class Failing:
    """A library that fails at one of its functions."""

    def __init__(self, stub: Stub, lib: Any, name: str, number: int) -> None:
        self._stub, self._lib, self._name, self._number = stub, lib, name, number

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            self._stub.fail(self._number)
        return getattr(self._lib, name)


@pytest.mark.parametrize(
    ("name", "number", "named"),
    [
        ("xs_transaction_start", errno.ENOMEM, "a transaction: Cannot allocate memory"),
        ("xs_write", errno.ENOSPC, "writing to backend/7: No space left"),
        ("xs_transaction_end", errno.EIO, "writing to backend/7: Input/output error"),
    ],
)
def test_nothing_is_written_and_the_cause_named_when_xenstore_refuses(
    xenstore: LibXenstore, stub: Stub, monkeypatch: pytest.MonkeyPatch, name: str, number: int, named: str
) -> None:
    stub.put("backend/7")
    with monkeypatch.context() as patch:
        patch.setattr(xenstore, "_lib", Failing(stub, xenstore._lib, name, number))
        with pytest.raises(UnavailableError, match=named):
            xenstore.update("backend/7", {"ready": b"1", "state": b"4"})
    assert stub.log()[-1] == ("start" if "start" in name else f"end {TRANSACTION} {int(name == 'xs_write')}")
    assert xenstore.read("backend/7/ready") is None


# -- event channels -------------------------------------------------------------------------------------------------
def test_channel_is_bound_used_and_unbound_when_a_domain_has_offered_it(stub: Stub) -> None:
    with LibEventChannels() as channels:
        stub.log()
        channel = channels.bind(32751, 131071)
        assert channel.port == 77
        channel.unmask()
        channel.notify()
        channel.close()
        assert stub.log() == ["bind 32751 131071", "unmask 77", "notify 77", "unbind 77"]


def test_events_are_taken_without_waiting_when_there_are_some_or_none(stub: Stub) -> None:
    with LibEventChannels() as channels:
        assert channels.pending() is None
        stub.lib.stub_send()
        assert channels.pending() == 77
        assert channels.pending() is None


def test_error_has_xens_number_when_it_refuses_a_channel(stub: Stub) -> None:
    with LibEventChannels() as channels:
        stub.fail(errno.EINVAL)
        with pytest.raises(OSError, match="Invalid argument"):
            channels.bind(7, 1)
        channel = channels.bind(7, 1)
        for call in (channel.notify, channel.unmask):
            stub.fail(errno.ENOTCONN)
            with pytest.raises(OSError, match="not connected"):
                call()
        stub.fail(errno.ENOTCONN)
        with pytest.raises(UnavailableError, match="77 cannot be unbound"):
            channel.close()
        stub.lib.stub_send()
        stub.fail(errno.EIO)
        with pytest.raises(UnavailableError, match="no event can be taken"):
            channels.pending()


# -- grants ---------------------------------------------------------------------------------------------------------
def test_page_is_read_and_written_within_its_bounds_alone_when_mapped(stub: Stub) -> None:
    with LibGrants() as grants:
        stub.log()
        page = grants.map(7, 2**32 - 1)
        page.write(0, b"\1\2\3")
        page.write(4095, b"\xff")
        page.write(4096, b"")
        assert page.read(0, 4) == b"\1\2\3\0"
        assert page.read(4094, 2) == b"\0\xff"
        assert len(page.read(0, 4096)) == 4096
        for offset, count in ((-1, 1), (4096, 1), (0, 4097), (4090, 7), (5, -1)):
            with pytest.raises(ValueError, match="outside the page"):
                page.read(offset, count)
        for offset, data in ((-1, b"a"), (4096, b"a"), (4090, b"seven..")):
            with pytest.raises(ValueError, match="outside the page"):
                page.write(offset, data)
        page.close()
        page.close()
        assert stub.log() == ["map 7 4294967295 3", "unmap 1 1"]
        with pytest.raises(ValueError, match="not mapped any more"):
            page.read(0, 1)


def test_error_has_xens_number_when_it_refuses_a_page(stub: Stub) -> None:
    with LibGrants() as grants:
        stub.fail(errno.EINVAL)
        with pytest.raises(OSError, match="Invalid argument"):
            grants.map(7, 8)
        page = grants.map(7, 8)
        stub.fail(errno.EINVAL)
        with pytest.raises(UnavailableError, match="cannot be unmapped"):
            page.close()


def test_grants_are_refused_when_the_processor_does_not_keep_accesses_in_order(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = os.uname_result(("Linux", "host", "6.1", "1", "aarch64"))
    monkeypatch.setattr(os, "uname", lambda: other)
    with pytest.raises(UnavailableError, match="aarch64"):
        LibGrants()
    assert stub.handles == 0
