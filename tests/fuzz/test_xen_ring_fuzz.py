"""A page that its front-end rewrites before every access: what is taken is one bounded copy, and no more happens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import spoiled
from tests.support.xen_page import NotedPage, fill
from vtpm.errors import ProtocolError
from vtpm.tpm.headers import CommandHeader
from vtpm.wire.xen_ring import MAX_PACKET_BYTES, PAGE_BYTES, BackendRing, PageState, Request, Settled

STATE_AT = 4


@st.composite
def commands(draw: st.DrawFn) -> bytes:
    """A whole command, most often a small one."""
    size = draw(st.one_of(st.integers(10, 40), st.sampled_from([10, MAX_PACKET_BYTES])))
    return (draw(st.binary(min_size=2, max_size=2)) + size.to_bytes(4, "big")).ljust(size, b"\xa5")


_state = st.one_of(
    *(st.just(int(state)) for state in (PageState.SUBMIT, PageState.CANCEL, PageState.FINISH)), st.integers(0, 255)
)
_byte = st.one_of(st.integers(0, 6), st.integers(0, 255))
_length = st.one_of(st.integers(0, 64), st.sampled_from([MAX_PACKET_BYTES, MAX_PACKET_BYTES + 1, 2**31, 2**32 - 1]))
_FIELDS = {"length": (0, 4, _length), "state": (4, 1, _state), "locality": (5, 1, _byte), "extra": (7, 1, _byte)}


@st.composite
def rewrites(draw: st.DrawFn) -> list[tuple[int, bytes]]:
    """What a front-end does before one access: fields anew, bytes of the packet anew, or all of it."""
    changes = []
    for at, size, values in draw(st.lists(st.sampled_from(list(_FIELDS.values())), max_size=3)):
        changes.append((at, draw(values).to_bytes(size, "little")))
    if draw(st.booleans()):
        changes.append((draw(st.integers(8, 40)), draw(st.binary(max_size=40))))
    return changes


class HostilePage(NotedPage):
    """A page on which one list of changes is made before each access, until there are none left."""

    def __init__(self, packet: bytes, header: dict[str, int], changes: list[list[tuple[int, bytes]]]) -> None:
        super().__init__(self._rewrite)
        fill(self.memory, packet, **header)
        self._changes = list(changes)

    def _rewrite(self, memory: bytearray) -> None:
        for at, data in self._changes.pop(0) if self._changes else []:
            memory[at : at + len(data)] = data


_header = st.fixed_dictionaries(
    {}, optional={"state": _state, "locality": st.integers(0, 255), "extra_pages": st.integers(0, 255)}
)
pages = st.builds(HostilePage, st.one_of(commands(), spoiled(commands())), _header, st.lists(rewrites(), max_size=8))


def check_reads(page: NotedPage) -> None:
    """Every byte was read once at most, and the state before all else."""
    seen = [access.offset + at for access in page.reads for at in range(len(access.data))]
    assert seen[0] == STATE_AT
    assert len(seen) == len(set(seen))


@effort.codec
@given(pages)
def test_what_is_taken_is_one_bounded_copy_when_every_field_changes_between_reads(page: HostilePage) -> None:
    outcome = BackendRing(page).take()
    check_reads(page)
    if isinstance(outcome, Request):
        last = page.reads[-1]
        assert (outcome.packet_at, outcome.command) == (last.offset, last.data)
        assert CommandHeader.parse(outcome.command).size_bytes == len(outcome.command) <= MAX_PACKET_BYTES
        assert 0 <= outcome.locality <= 4
        assert page.writes == []
    elif isinstance(outcome, Settled):
        assert [(access.offset, access.data) for access in page.writes] == [(STATE_AT, b"\0")]
    else:
        assert len(page.accesses) == 1


@effort.codec
@given(commands(), st.lists(rewrites(), max_size=12), st.binary(max_size=64) | commands())
def test_answer_is_written_once_and_in_order_when_the_page_changes_under_it(
    command: bytes, changes: list[list[tuple[int, bytes]]], response: bytes
) -> None:
    page = HostilePage(command, {}, [])
    ring = BackendRing(page)
    request = ring.take()
    assert isinstance(request, Request)
    page._changes = changes
    looked = len(page.reads)
    assert ring.take() is None
    try:
        ring.finish(response)
    except ProtocolError:
        assert not 10 <= len(response) <= PAGE_BYTES - request.packet_at
        ring.abandon()
        assert [access.offset for access in page.writes] == [STATE_AT]
    else:
        assert [access.offset for access in page.writes] == [request.packet_at, 0, STATE_AT]
        assert page.writes[0].data == response
        assert page.writes[1].data == len(response).to_bytes(4, "little")
    assert len(page.reads) == looked
    assert page.writes[-1].data in (b"\0", b"\2")
