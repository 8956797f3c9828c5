"""Adversarial tests 13, 25: a vTPM's virtual machine that runs a modified vtpmd, through the whole host.

The image is built as any, with an attacker's program as init (tests/support/hostile). What it got is what it reports of
itself, over the relay, to its own client. Its siblings are used all the while. `python -m bench hostile` has the times.
"""

from __future__ import annotations

import secrets
import statistics
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.fault.writer import TpmConnection, data_socket
from tests.support.host import Host
from tests.support.hostile.machine import Attacker, build_hostile, put_in_place
from tests.support.hostile.siblings import NAMES, Siblings, Waits
from tests.support.image.building import build_vtpmd
from tests.unit.engine import commands
from vtpm.client.manager_client import ManagerClient
from vtpm.errors import AccessDeniedError
from vtpm.tpm.types import StateKind, TpmVersion
from vtpm.wire import guest_port
from vtpm.wire.api import DomainName, LifeState
from vtpm.wire.framing import encode_frame
from vtpm.wire.manager_link import (
    ClientKind,
    Hello,
    LinkPower,
    Load,
    LoadError,
    Message,
    Note,
    Permit,
    Ready,
    Retry,
    SaveBegin,
    Saved,
    encode_message,
)
from vtpm.wire.manager_link_peers import save_digest, state_digest

pytestmark = pytest.mark.timeout(400)

DRIVERS_PATIENCE_S = 0.75
"""A guest's driver takes its TPM for dead after as long (Linux drivers/char/tpm/tpm_tis_core.h, TIS_SHORT_TIMEOUT)."""
WRITE_PATIENCE_S = 1.5
EVENT_S = 60.0
LONGEST_REST_S = 10.0
FLOOD_S = 1.0
MARK = secrets.token_bytes(16)
OWN_STATE = MARK * 64
HARMLESS = {"Hello", "PowerOn", "Permit", "Saved", "StateChunk", "AskLockout"}


@pytest.fixture(scope="module")
def hostile_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_hostile(tmp_path_factory.mktemp("hostile"))


def _settings(images: Path, more: str = "") -> str:
    return f'vm_accelerator = "tcg"\nvm_images = "{images}"\n{more}'


@pytest.fixture(scope="module")
def host(hostile_images: Path) -> Iterator[Host]:
    with Host(settings=_settings(hostile_images)) as host:
        yield host


@pytest.fixture(scope="module")
def client(host: Host) -> Iterator[ManagerClient]:
    with host.client() as client:
        yield client


@pytest.fixture(scope="module")
def siblings(host: Host) -> Iterator[Siblings]:
    with Siblings(host) as siblings:
        yield siblings


@pytest.fixture(autouse=True)
def stopped_after(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leaves no virtual machine of one test to the next."""
    yield
    if "client" in request.fixturenames:
        client: ManagerClient = request.getfixturevalue("client")
        for vtpm in client.list():
            if vtpm.name not in NAMES and vtpm.state is not LifeState.STOPPED:
                client.stop(vtpm.name)


def _start(client: ManagerClient, name: str) -> Attacker:
    client.create(name, TpmVersion.V2_0, DomainName.QEMU)
    return Attacker(data_socket(client.start(name).tcti))


def _own_state(attacker: Attacker) -> None:
    assert attacker.order("load") == "Permit"
    assert attacker.order("save", int(StateKind.PERMANENT), MARK.hex(), len(OWN_STATE) // len(MARK)) == "Saved"


def _frame(body: bytes) -> str:
    return encode_frame(body).hex()


@contextmanager
def _used(siblings: Siblings, what: str) -> Iterator[Waits]:
    """Siblings are used while this lasts; every answer comes, in time."""
    with siblings.used() as waits:
        yield waits
    for name, times in (("reads", waits.reads), ("writes", waits.writes), ("looks at the manager", waits.looks)):
        ordered = sorted(times)
        p99 = ordered[int(len(ordered) * 0.99)]
        print(
            f"{what}: {len(times)} {name}, median {statistics.median(times) * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms,"
            f" most {ordered[-1] * 1e3:.1f} ms"
        )
    assert max(waits.reads) < DRIVERS_PATIENCE_S
    assert max(waits.writes) < WRITE_PATIENCE_S
    assert len(waits.reads) > 10 and waits.writes and waits.looks


def _last_id(client: ManagerClient) -> int:
    return max((event.id for event in client.all_events()), default=0)


def _wait_event(client: ManagerClient, kind: str, vtpm: str, after: int) -> dict[str, object]:
    deadline = time.monotonic() + EVENT_S
    while time.monotonic() < deadline:
        for event in client.events(after, wait_s=5):
            after = event.id
            if (event.kind, event.vtpm) == (kind, vtpm):
                return event.detail
    raise AssertionError(f"no event {kind} of {vtpm} came")


def test_no_state_is_given_when_an_image_with_a_modified_vtpmd_was_not_allowed(
    hostile_images: Path, tmp_path: Path
) -> None:
    images = build_vtpmd(tmp_path / "honest")
    secret = secrets.token_bytes(32)
    with (
        Host(settings=_settings(images, 'new_images = "refuse"\n')) as host,
        host.client() as client,
        Siblings(host) as siblings,
    ):
        client.create("web1", TpmVersion.V2_0, DomainName.QEMU)
        tpm = TpmConnection(data_socket(client.start("web1").tcti))
        tpm.startup()
        tpm.succeed(commands.nv_define(0x0150_0040, len(secret)))
        tpm.succeed(commands.nv_write(0x0150_0040, secret))
        tpm.close()
        honest = client.stop("web1").measurement
        hostile = put_in_place(hostile_images, images)
        for _ in range(2):
            with pytest.raises(AccessDeniedError, match="not allowed") as refused:
                client.start("web1")
            assert f"vtpm policy allow-image {hostile}" in (refused.value.next_step or "")
            assert client.show("web1").state is LifeState.STOPPED
        host.cli("policy", "allow-image", hostile, "--label", "a modified vtpmd")
        assert client.start("web1").measurement == hostile != honest
        with Attacker(data_socket(client.show("web1").tcti)) as attacker:
            # What allowing it means: it has that vTPM's state, and nobody else's.
            assert attacker.order("load").startswith("StateEnd")
            assert int(attacker.order("find", secret.hex())) > 0
            assert attacker.order("find", siblings.secret.hex()) == "0"
        client.stop("web1")


def _claims(sibling_id: bytes, sibling_name: bytes) -> list[str]:
    """Bytes by which an instance might say that it is another, or ask for what is another's; none is a message."""
    load, note = encode_message(Load(7)), encode_message(Note("x"))
    ready = encode_message(Ready(sibling_id, TpmVersion.V2_0, LinkPower.ON, ClientKind.NONE, 1, 1))
    foreign: tuple[Message, ...] = (
        Hello(sibling_id),
        Permit(7, sibling_id),
        Saved(7),
        LoadError(7, Retry.LATER, "x", "x"),
    )
    bodies = [
        *(load + what for what in (sibling_id, sibling_name, struct.pack(">H", len(sibling_name)) + sibling_name)),
        ready,
        ready + sibling_id,
        *map(encode_message, foreign),
        note[:2] + b"\0\1" + note[4:],
        b"\2" + note[1:],
        note[:1] + b"\x8f" + note[2:],
        note[:-1],
        bytes(7),
        b"",
    ]
    frames = [_frame(body) for body in bodies]
    broken = bytearray(encode_frame(load))
    broken[-2] ^= 1
    return [
        *frames,
        broken.hex(),
        encode_frame(load)[:-4].hex() + "c0",
        "c0" + "db00" * 8 + "c0",
        "c0" + "78" * 1500 + "c0",
    ]


def _undue() -> list[str]:
    """Frames for the relay that no vtpmd sends, fewer than it bears with."""
    response = struct.pack(">HII", 0x8001, 16, 0) + b"unduly"
    bodies = [
        guest_port.encode_message(guest_port.Ready(bytes(guest_port.SESSION_BYTES))),
        *(guest_port.encode_message(guest_port.Response(number, response)) for number in (1, 99)),
        *(guest_port.encode_message(guest_port.Reply(number, bytes(4))) for number in (1, 99)),
        guest_port.encode_message(guest_port.Closed(99)),
        guest_port.encode_message(guest_port.Note("to a relay")),
        struct.pack(">BBHI", 1, 0x83, 0, 1) + struct.pack(">HII", 0x8001, 4097, 0),
        struct.pack(">BBHI", 1, 0x83, 0, 1) + struct.pack(">HII", 0x8001, 17, 0) + b"unduly",
    ]
    return [_frame(body) for body in bodies]


def test_modified_vtpmd_hears_of_nobody_else_when_it_claims_to_be_a_sibling(
    host: Host, client: ManagerClient, siblings: Siblings
) -> None:
    sibling = client.show(NAMES[0])
    before = _last_id(client)
    claims = _claims(sibling.uuid.bytes, sibling.name.encode())
    with _used(siblings, "claims"), _start(client, "claims") as attacker:
        _own_state(attacker)
        own = f"StateEnd:{state_digest({StateKind.PERMANENT: OWN_STATE}).hex()}"
        for number, claim in enumerate(claims):
            assert attacker.order("raw", claim) == "done"
            if number % 3 == 0:
                assert attacker.order("load") == own
        # A save with what stands for a permit, and one of another's number: its own vTPM's alone, and refused.
        for permit in (sibling.uuid.bytes, MARK):
            digest = save_digest(StateKind.PERMANENT, b"")
            attacker.order("send", encode_message(SaveBegin(1, StateKind.PERMANENT, 0, permit, digest)).hex())
        assert attacker.order("load") == own
        heard = attacker.order("heard").split()
        assert attacker.order("find", MARK.hex()) != "0"
        for secret in (siblings.secret, sibling.uuid.bytes, sibling.name.encode(), str(sibling.uuid).encode()):
            assert attacker.order("find", secret.hex()) == "0"
        for frame in _undue():
            # While an order is under way a response is due, and either may be it; the other is not followed.
            assert attacker.order("guest", frame) in ("done", "unduly")
        assert attacker.came_unasked() == b""
    others = [word for word in heard if word not in HARMLESS and word != own]
    assert all(word.startswith("SaveError:") for word in others), others
    shown = client.show("claims")
    assert shown.state is LifeState.RUNNING
    assert f"claims: refused ({min(len(claims), 10)} so far)" in host.log()
    for event in client.all_events(before):
        assert event.vtpm == "claims" or event.kind == "image_allowed", event
    assert client.show(NAMES[0]) == sibling


@pytest.mark.parametrize("flood", ["garbage", "out-of-order", "unheard-loads"])
def test_modified_vtpmd_is_ended_and_siblings_go_on_when_it_floods_the_manager(
    client: ManagerClient, siblings: Siblings, flood: str
) -> None:
    name = f"flood-{flood}"
    with _used(siblings, flood), _start(client, name) as attacker:
        _own_state(attacker)
        if flood == "unheard-loads":
            for kind in (StateKind.PERMANENT, StateKind.SAVESTATE):
                assert attacker.order("save", int(kind), "c0", 2 << 20) == "Saved"
        before = _last_id(client)
        attacker.order("flood", flood)
        assert int(str(_wait_event(client, "misbehaved", name, before)["complaints"])) > 0
        assert "SIGKILL" in str(_wait_event(client, "instance_ended", name, before)["how"])
        assert attacker.wait_ended() == b""
    assert client.show(name).state is LifeState.STOPPED


def test_siblings_go_on_when_a_modified_vtpmd_says_without_end_what_a_vtpmd_may_say(
    client: ManagerClient, siblings: Siblings
) -> None:
    before = _last_id(client)
    with _start(client, "endless") as attacker:
        _own_state(attacker)
        with _used(siblings, "power"):
            attacker.order("flood-guest", "power")
            time.sleep(FLOOD_S)
            attacker.order("rest")
        # Empty frames last: each is owed for, so a link that was full of them rests for longer than a test.
        for flood in ("words", "endless", "loads", "saves", "empty"):
            with _used(siblings, flood):
                sent = int(attacker.order("sent"))
                attacker.order("flood", flood)
                # Its link may rest for a while yet for what it said in the flood before.
                deadline_s = time.monotonic() + LONGEST_REST_S
                while int(attacker.order("sent")) <= sent:
                    assert time.monotonic() < deadline_s
                    time.sleep(0.1)
                time.sleep(FLOOD_S)
                attacker.order("rest")
        assert attacker.came_unasked() == b""
    client.stop("endless")
    # What it may have noted is little.
    assert len([event for event in client.all_events(before) if event.vtpm == "endless"]) < 60


def test_client_gets_nothing_and_the_relay_ends_it_when_a_modified_vtpmd_floods_the_guest_port(
    host: Host, client: ManagerClient, siblings: Siblings
) -> None:
    name = "port"
    with _used(siblings, "guest port"), _start(client, name) as attacker:
        before = _last_id(client)
        # It may be ended before its answer has come.
        with suppress(ConnectionError):
            attacker.order("flood-guest", "garbage")
        how = str(_wait_event(client, "instance_died", name, before)["how"])
        assert "the virtual machine says what no vtpmd says" in how
        assert attacker.wait_ended() == b""
    assert f"{name}: the virtual machine: " in host.service_logs()
    client.stop(name)
