"""A guest that does anything to page, keys and channel: the back-end lives on and holds nothing of the dead."""

from __future__ import annotations

from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.support.fake_xen import fake_xen
from tests.support.xen_frontend import LinuxFrontend
from vtpm.guest_link.xen.backend import PvTpmBackend
from vtpm.tpm.headers import CommandHeader
from vtpm.wire.xen_ring import MAX_PACKET_BYTES

ID = "0f1c2f0e-6b3c-4f6e-9d1e-2a7f6f3b9c11"
GUEST, SIBLING = 7, 9
COMMAND = bytes.fromhex("8001 0000000c 00000144 0000")
RESPONSE = bytes.fromhex("8001 0000000a 00000000")

_offset = st.one_of(st.integers(0, 12), st.integers(0, 4095))
_byte = st.one_of(st.integers(0, 5), st.integers(0, 255))
pokes = st.lists(st.tuples(_offset, _byte), max_size=4)
_value = st.one_of(
    st.integers(0, 8).map(lambda number: str(number).encode()),
    st.sampled_from([b"", b"-1", b"99999", b"4294967295", b"9" * 4096, b"\xff\0"]),
)
moves = st.one_of(
    st.tuples(st.just("probe")),
    st.tuples(st.just("send")),
    st.tuples(st.just("notify")),
    st.tuples(st.just("poke"), pokes),
    st.tuples(st.just("write"), st.sampled_from(["state", "ring-ref", "event-channel", "feature-protocol-v2"]), _value),
    st.tuples(st.just("state"), st.sampled_from([1, 3, 4, 5, 6])),
    st.tuples(st.just("hide"), st.sampled_from(["", "/state", "/ring-ref"])),
    st.tuples(st.just("drop"), st.sampled_from(["", "/state", "/ring-ref"])),
    st.tuples(st.just("ungrant")),
)


@effort.codec
@given(st.lists(moves, max_size=24), st.lists(pokes, max_size=24))
def test_back_end_lives_and_holds_one_page_at_most_when_a_guest_does_anything(
    made: list[tuple[object, ...]], poked: list[list[tuple[int, int]]]
) -> None:
    executed: list[bytes] = []

    def execute(command: bytes, locality: int) -> bytes:
        assert CommandHeader.parse(command).size_bytes == len(command) <= MAX_PACKET_BYTES
        assert 0 <= locality <= 4
        executed.append(command)
        return RESPONSE

    def rewrite(memory: bytearray) -> None:
        for at, value in poked.pop() if poked else []:
            memory[at] = value

    with fake_xen() as xen:
        domain = xen.create_domain(GUEST)
        xen.attach(GUEST, ID)
        guest = LinuxFrontend(xen, GUEST)
        with PvTpmBackend(xen.hypervisor, UUID(ID), execute, [].append) as backend:
            backend.serve(0)
            for move in [("probe",), ("state", 4), *made]:
                match move:
                    case ("probe",):
                        guest.probe()
                        guest.page.before = rewrite
                    case ("send",):
                        guest.page.memory[4] = 0
                        guest.send(COMMAND)
                    case ("notify",):
                        guest.notify()
                    case ("poke", places):
                        for at, value in places:  # type: ignore[attr-defined]
                            guest.page.memory[at] = value
                    case ("write", name, value):
                        xen.xenstore.put({f"{guest.path}/{name}": value})  # type: ignore[dict-item]
                    case ("state", value):
                        xen.xenstore.put({f"{guest.path}/state": str(value).encode()})
                    case ("hide", name):
                        xen.xenstore.forbidden ^= {guest.path + name}  # type: ignore[operator]
                    case ("drop", name):
                        xen.xenstore.drop(guest.path + name)  # type: ignore[operator]
                    case ("ungrant",):
                        domain.pages.clear()
                backend.serve(0)
                assert xen.held in ((0, 0), (1, 1))
            xen.destroy(GUEST)
            backend.serve(0)
            assert xen.held == (0, 0)
            xen.xenstore.drop(f"backend/vtpm/{GUEST}")
            backend.serve(0)
            # Whatever it did, the next guest of this vTPM finds it as it should be.
            xen.create_domain(SIBLING)
            xen.attach(SIBLING, ID)
            sibling = LinuxFrontend(xen, SIBLING)
            sibling.probe()
            before = len(executed)
            for _ in range(3):
                backend.serve(0)
                sibling.look()
            sibling.send(COMMAND)
            backend.serve(0)
            backend.serve(0)
            assert sibling.receive() == RESPONSE
            assert executed[before:] == [COMMAND]
