"""The back-end's side of the PV TPM page takes whole commands alone, reads nothing twice and answers in order."""

from __future__ import annotations

import pytest

from tests.support.xen_page import Access, NotedPage, fill
from vtpm.errors import ProtocolError
from vtpm.wire.xen_ring import MAX_PACKET_BYTES, PAGE_BYTES, BackendRing, PageState, Request, Settled

COMMAND = bytes.fromhex("8001 0000000c 00000144 0000")
RESPONSE = bytes.fromhex("8001 0000000a 00000000")
STATE_AT = 4


def command_of(size: int, claimed: int | None = None) -> bytes:
    return (b"\x80\x01" + (size if claimed is None else claimed).to_bytes(4, "big")).ljust(size, b"\x5a")


def submitted(packet: bytes = COMMAND, **header: int) -> NotedPage:
    page = NotedPage()
    fill(page.memory, packet, **header)
    return page


@pytest.mark.parametrize("locality", range(5))
def test_request_is_copied_out_when_submitted(locality: int) -> None:
    page = submitted(locality=locality)
    request = BackendRing(page).take()
    assert request == Request(COMMAND, locality, 8)
    assert page.writes == []
    assert "5a" not in repr(request) and "0144" not in repr(request)


@pytest.mark.parametrize("size", [10, MAX_PACKET_BYTES])
def test_request_is_taken_when_it_is_as_small_or_large_as_may_be(size: int) -> None:
    request = BackendRing(submitted(command_of(size))).take()
    assert isinstance(request, Request) and request.command == command_of(size)


def test_packet_is_found_behind_the_grants_when_there_are_extra_pages() -> None:
    page = submitted(command_of(PAGE_BYTES - 8 - 4 * 255), extra_pages=255)
    ring = BackendRing(page)
    request = ring.take()
    assert isinstance(request, Request) and request.packet_at == 8 + 4 * 255
    ring.finish(RESPONSE)
    assert page.memory[request.packet_at :].startswith(RESPONSE)


def test_each_byte_is_read_once_and_the_state_first_when_a_request_is_taken() -> None:
    page = submitted()
    BackendRing(page).take()
    seen = [access.offset + at for access in page.reads for at in range(len(access.data))]
    assert seen[0] == STATE_AT
    assert len(seen) == len(set(seen))


def test_response_length_and_state_are_written_in_this_order_when_answered() -> None:
    page = submitted()
    ring = BackendRing(page)
    ring.take()
    ring.finish(RESPONSE)
    assert page.writes == [Access(True, 8, RESPONSE), Access(True, 0, b"\x0a\0\0\0"), Access(True, 4, b"\2")]
    assert page.memory[:8] == b"\x0a\0\0\0\2\0\0\0"


@pytest.mark.parametrize("state", [PageState.IDLE, PageState.FINISH, 4, 0x80, 0xFF])
def test_nothing_but_the_state_is_looked_at_when_it_is_not_the_back_ends_turn(state: int) -> None:
    page = submitted(state=state)
    assert BackendRing(page).take() is None
    assert page.accesses == [Access(False, STATE_AT, bytes((state,)))]


def test_page_is_idle_when_the_front_end_cancels_and_nothing_is_under_way() -> None:
    page = submitted(state=PageState.CANCEL)
    ring = BackendRing(page)
    assert ring.take() == Settled("")
    assert page.writes == [Access(True, STATE_AT, b"\0")]
    fill(page.memory, COMMAND)
    assert isinstance(ring.take(), Request)


def test_response_is_given_all_the_same_when_the_front_end_cancels_what_is_under_way() -> None:
    page = submitted()
    ring = BackendRing(page)
    ring.take()
    page.memory[STATE_AT] = PageState.CANCEL
    looked = len(page.accesses)
    assert ring.take() is None
    assert len(page.accesses) == looked
    ring.finish(RESPONSE)
    assert page.memory[STATE_AT] == PageState.FINISH
    assert ring.take() is None


@pytest.mark.parametrize(
    ("packet", "header", "named"),
    [
        (b"", {}, "has 0 bytes; 10 to 4088"),
        (command_of(9, 10), {}, "has 9 bytes"),
        (command_of(MAX_PACKET_BYTES + 1), {}, "has 4089 bytes"),
        (command_of(MAX_PACKET_BYTES - 3), {"extra_pages": 1}, "10 to 4084 fit a page with 1 extra"),
        (command_of(20, 19), {}, "claims 19 bytes and its page 20"),
        (command_of(20, 4088), {}, "claims 4088 bytes and its page 20"),
        (command_of(20, 2**32 - 1), {}, "claims 4294967295 bytes"),
        (COMMAND, {"locality": 5}, "locality 5"),
        (COMMAND, {"locality": 255}, "locality 255"),
    ],
)
def test_page_is_idle_and_the_cause_named_when_a_request_is_malformed(
    packet: bytes, header: dict[str, int], named: str
) -> None:
    page = submitted(packet, **header)
    settled = BackendRing(page).take()
    assert isinstance(settled, Settled) and named in settled.refusal
    assert page.writes == [Access(True, STATE_AT, b"\0")]


def test_length_is_bounded_when_it_is_the_largest_number() -> None:
    page = submitted()
    page.memory[:4] = b"\xff" * 4
    assert isinstance(BackendRing(page).take(), Settled)
    assert max(len(access.data) for access in page.reads) == 4


def test_command_is_that_of_one_copy_when_the_page_changes_after_it() -> None:
    page = submitted()
    ring = BackendRing(page)
    request = ring.take()
    page.memory[:] = b"\xff" * PAGE_BYTES
    assert request == Request(COMMAND, 0, 8)
    ring.finish(RESPONSE)
    assert page.memory[8 : 8 + len(RESPONSE)] == RESPONSE


@pytest.mark.parametrize("size", [0, 9, MAX_PACKET_BYTES + 1])
def test_request_stays_under_way_when_a_response_does_not_fit(size: int) -> None:
    page = submitted()
    ring = BackendRing(page)
    ring.take()
    with pytest.raises(ProtocolError, match=f"has {size} bytes; 10 to 4088"):
        ring.finish(bytes(size))
    assert page.writes == []
    ring.abandon()
    assert page.writes == [Access(True, STATE_AT, b"\0")]


def test_response_is_written_to_the_last_byte_when_it_is_as_large_as_may_be() -> None:
    page = submitted()
    ring = BackendRing(page)
    ring.take()
    ring.finish(command_of(MAX_PACKET_BYTES))
    assert page.memory[8:] == command_of(MAX_PACKET_BYTES)


@pytest.mark.parametrize("answer", [lambda ring: ring.finish(RESPONSE), lambda ring: ring.abandon()])
def test_answer_is_refused_when_no_request_is_under_way(answer) -> None:  # type: ignore[no-untyped-def]
    page = submitted()
    ring = BackendRing(page)
    with pytest.raises(ValueError, match="no request"):
        answer(ring)
    ring.take()
    answer(ring)
    with pytest.raises(ValueError, match="no request"):
        answer(ring)
