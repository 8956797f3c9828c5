"""How the back-end of a Xen PV TPM agrees with a front-end over xenstore: what keys say, and what follows from them.

Two directories belong to a device. The toolstack and the back-end's domain write the back-end's, the front-end's domain
writes its own as it likes: every key of it is bounded here, and none of it says who the front-end is. That follows from
the path of the back-end's directory, which has the domain id, and from its uuid, which names the vTPM.

Pure: `Handshake` is told what the keys hold and says what is to be done, as often as anything may have changed.
For guest_link. Decision record 28; docs/protocols.md has the table.
Source: Xen's public headers io/xenbus.h and io/tpmif.h (4.17); libxl's libxl_device.c for what the toolstack waits for.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from vtpm.errors import ProtocolError

BACKENDS = "backend/vtpm"
"""Directory of the back-end's devices, below the home of its own domain."""
MAX_DOMAIN_ID = 0x7FEF
"""DOMID_FIRST_RESERVED - 1."""
MAX_HANDLE = 2**31 - 1
FIRST_GRANT = 8
"""Grant references below it are reserved for console and xenstore (GNTTAB_NR_RESERVED_ENTRIES)."""
MAX_GRANT = 2**32 - 1
MAX_PORT = 2**17 - 1
"""Event channels of the FIFO ABI (EVTCHN_FIFO_NR_CHANNELS); 0 is no port."""

_NUMBER = re.compile(rb"0|[1-9][0-9]{0,9}")
_DEVICE = re.compile(rf"{BACKENDS}/([0-9]+)/([0-9]+)(?:/.*)?")
_UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SHOWN_BYTES = 32


class XenbusState(enum.IntEnum):
    """State of one side of a device, the key `state` of its directory."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8


@dataclass(frozen=True, slots=True)
class DeviceId:
    """One device of this back-end: the front-end's domain (0 to MAX_DOMAIN_ID) and handle (0 to MAX_HANDLE)."""

    domain: int
    handle: int

    @property
    def backend_path(self) -> str:
        """The back-end's directory, relative to the home of its own domain."""
        return f"{BACKENDS}/{self.domain}/{self.handle}"

    @property
    def frontend_path(self) -> str:
        """The front-end's directory, which is its domain's own to write."""
        return f"/local/domain/{self.domain}/device/vtpm/{self.handle}"

    @classmethod
    def of_path(cls, path: str) -> DeviceId | None:
        """Return the device that a path below BACKENDS belongs to; None when it belongs to none."""
        if (found := _DEVICE.fullmatch(path)) is None:
            return None
        try:
            domain = parse_number(found[1].encode(), "domain id", 0, MAX_DOMAIN_ID)
            handle = parse_number(found[2].encode(), "handle", 0, MAX_HANDLE)
        except ProtocolError:
            return None
        return cls(domain, handle)


@dataclass(frozen=True, slots=True)
class Keys:
    """What the keys of a device hold; None where there is none, or it may not be read.

    Fields: uuid, frontend_id, online (back-end's directory); state, ring_ref, event_channel, protocol_v2 (front-end's).
    """

    uuid: bytes | None
    frontend_id: bytes | None
    online: bytes | None
    state: bytes | None
    ring_ref: bytes | None
    event_channel: bytes | None
    protocol_v2: bytes | None


@dataclass(frozen=True, slots=True)
class Write:
    """Write these keys of the back-end's directory, together, and only while it is there."""

    keys: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Connect:
    """Map the grant and bind the event channel, both of the device's domain; then `connected` or `refused`.

    Fields: ring_ref (FIRST_GRANT to MAX_GRANT), event_channel (1 to MAX_PORT).
    """

    ring_ref: int
    event_channel: int


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Let go of grant and event channel, if there are any."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Say why this front-end is refused."""

    reason: str


@dataclass(frozen=True, slots=True)
class Retire:
    """Remove the back-end's directory, once the toolstack has had the time to see that it is closed."""


Action = Write | Connect | Disconnect | Refuse | Retire


class Phase(enum.Enum):
    """How far a device has come. Only in CONNECTED and CLOSING is anything held of the front-end's domain."""

    NEW = enum.auto()
    """Nothing was written. After a crash of the back-end the front-end may be in any state; it is connected anew."""
    WAITING = enum.auto()
    """For the front-end's keys."""
    CONNECTED = enum.auto()
    CLOSING = enum.auto()
    """The front-end may still send commands; Linux does, when its driver is taken away."""
    REFUSED = enum.auto()
    """The front-end's keys were malformed, could not be used, or are gone. It may begin anew."""
    OFFLINE = enum.auto()
    """The toolstack has detached the device. Nothing follows but the end."""
    GONE = enum.auto()
    """The directory is gone, or is another device's. Nothing is ever written again: that would make it anew."""


class _Step(enum.Enum):
    STAY = enum.auto()
    REST = enum.auto()
    OFFER = enum.auto()
    CLOSE = enum.auto()
    LOST = enum.auto()


_F = XenbusState
_USED: Mapping[XenbusState | None, _Step] = {
    _F.INITIALISING: _Step.REST,
    _F.INITIALISED: _Step.OFFER,
    _F.CLOSED: _Step.REST,
    None: _Step.LOST,
}
_STEPS: Mapping[Phase, Mapping[XenbusState | None, _Step]] = {
    Phase.WAITING: {_F.INITIALISED: _Step.OFFER, _F.CONNECTED: _Step.OFFER, _F.CLOSING: _Step.CLOSE},
    Phase.CONNECTED: {**_USED, _F.CONNECTED: _Step.OFFER, _F.CLOSING: _Step.CLOSE},
    Phase.CLOSING: _USED,
    Phase.REFUSED: {_F.INITIALISING: _Step.REST, _F.CLOSED: _Step.REST},
}
"""What follows from a front-end's state while the device is online; where nothing is named, nothing does."""


class Handshake:
    """One device's side of the agreement, until it is GONE; then a device of the same path needs another one.

    Args:
        device: of the back-end's directory.
        uuid: of the vTPM; a directory with another one is another device.
    """

    def __init__(self, device: DeviceId, uuid: UUID) -> None:
        self._device = device
        self._uuid = uuid
        self._phase = Phase.NEW
        self._offer: Connect | None = None
        self._was_connected = False

    @property
    def phase(self) -> Phase:
        """How far it has come."""
        return self._phase

    def step(self, keys: Keys) -> Sequence[Action]:
        """Say what follows from what the keys hold now; nothing from what was followed before.

        Returns:
            Actions in their order. A Connect is the last, and must be answered before the next step.
        """
        if self._phase is Phase.GONE:
            return ()
        if not belongs(keys.uuid, keys.frontend_id, self._device, self._uuid):
            self._phase = Phase.GONE
            return (Disconnect(),)
        actions: list[Action] = []
        if self._phase is Phase.NEW:
            self._phase = Phase.WAITING
            actions.append(_write(XenbusState.INIT_WAIT, {"feature-protocol-v2": b"1"}))
        state = parse_state(keys.state)
        if self._phase is Phase.OFFLINE:
            return ()
        if keys.online != b"1":
            return actions + self._detach(state)
        return actions + self._follow(state, keys)

    def connected(self) -> Sequence[Action]:
        """The last Connect went well."""
        self._phase = Phase.CONNECTED
        return (_write(XenbusState.CONNECTED, {"ready": b"1"}),)

    def refused(self, reason: str) -> Sequence[Action]:
        """The last Connect could not be carried out, or what was connected cannot be used any more."""
        self._phase = Phase.REFUSED
        return (Refuse(reason), Disconnect(), _write(XenbusState.CLOSED))

    def _detach(self, state: XenbusState | None) -> list[Action]:
        """The toolstack detaches the device. It waits for Closed, and then for the directory to go, 10 s each."""
        in_use = state in (XenbusState.INITIALISED, XenbusState.CONNECTED, XenbusState.CLOSING)
        if in_use and self._phase is Phase.CLOSING:
            return []
        if in_use and self._phase is Phase.CONNECTED:
            self._phase = Phase.CLOSING
            return [_write(XenbusState.CLOSING)]
        self._phase = Phase.OFFLINE
        return [Disconnect(), _write(XenbusState.CLOSED), Retire()]

    def _follow(self, state: XenbusState | None, keys: Keys) -> list[Action]:
        match _STEPS[self._phase].get(state, _Step.STAY):
            case _Step.REST:
                self._phase = Phase.WAITING
                return [Disconnect(), _write(XenbusState.INIT_WAIT)]
            case _Step.OFFER:
                return self._consider(state, keys)
            case _Step.CLOSE:
                self._phase = Phase.CLOSING
                return [_write(XenbusState.CLOSING)]
            case _Step.LOST:
                return list(self.refused("the front-end's directory is gone"))
            case _:
                return []

    def _consider(self, state: XenbusState | None, keys: Keys) -> list[Action]:
        """The front-end offers a page. It is another one, too, if the front-end was connected and is not any more."""
        try:
            offer = read_offer(keys)
        except ProtocolError as error:
            return list(self.refused(error.message))
        now_connected = state is XenbusState.CONNECTED
        if self._phase is Phase.CONNECTED and offer == self._offer and (now_connected or not self._was_connected):
            self._was_connected = now_connected
            return []
        again = self._phase is not Phase.WAITING
        self._phase = Phase.WAITING
        self._offer = offer
        self._was_connected = now_connected
        # Linux acts on changes of this state alone, so a front-end that has begun anew must see one.
        return [Disconnect(), _write(XenbusState.INIT_WAIT), offer] if again else [offer]


def parse_number(value: bytes | None, name: str, least: int, most: int) -> int:
    """Read a decimal number as xenstore's users write it: no sign, no blank, no leading zero.

    Raises:
        ProtocolError: there is none, it is no such number, or it is outside least to most.
    """
    if value is None:
        raise ProtocolError(f"{name} is missing")
    if _NUMBER.fullmatch(value) is None:
        raise ProtocolError(f"{name} is no number: {value[:_SHOWN_BYTES]!r}")
    number = int(value)
    if not least <= number <= most:
        raise ProtocolError(f"{name} is {number}; {least} to {most} are allowed")
    return number


def parse_state(value: bytes | None) -> XenbusState | None:
    """Read a key `state`: None where there is none, UNKNOWN where it is no state."""
    if value is None:
        return None
    try:
        return XenbusState(parse_number(value, "state", 0, max(XenbusState)))
    except ProtocolError:
        return XenbusState.UNKNOWN


def parse_uuid(value: bytes | None) -> UUID | None:
    """Read a key `uuid` in its usual form of 36 characters; None where it is anything else."""
    if value is None or _UUID.fullmatch(value.lower()) is None:
        return None
    return UUID(value.decode())


def belongs(uuid_key: bytes | None, frontend_id_key: bytes | None, device: DeviceId, uuid: UUID) -> bool:
    """Whether a device's directory, by two of its keys, is the vTPM's, and of the domain that its path names."""
    return parse_uuid(uuid_key) == uuid and frontend_id_key == str(device.domain).encode()


def read_offer(keys: Keys) -> Connect:
    """Return what a front-end offers to connect. Raises ProtocolError: a key is missing, malformed or out of bounds."""
    if keys.protocol_v2 != b"1":
        raise ProtocolError("feature-protocol-v2 is not 1: version 1 of the protocol is not spoken")
    return Connect(
        parse_number(keys.ring_ref, "ring-ref", FIRST_GRANT, MAX_GRANT),
        parse_number(keys.event_channel, "event-channel", 1, MAX_PORT),
    )


def _write(state: XenbusState, keys: Mapping[str, bytes] | None = None) -> Write:
    """Write keys and then the state: whoever sees it must find them."""
    return Write({**(keys or {}), "state": str(int(state)).encode()})
