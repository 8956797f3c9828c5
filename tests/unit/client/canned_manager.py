"""A manager's API on a real unix socket, answering from lists in memory; for tests of the client and the CLI."""

from __future__ import annotations

import base64
import dataclasses
import http.server
import json
import socketserver
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from vtpm.errors import ConflictError, NotFoundError, VtpmError
from vtpm.tpm.types import TpmVersion
from vtpm.wire.api import (
    HTTP_STATUS,
    MAX_VTPMS,
    ApiError,
    AuditEvent,
    Client,
    DomainName,
    ExportedVtpm,
    LifeState,
    Lockout,
    NewRecoveryKey,
    Owner,
    PcrSet,
    PlatformStatus,
    Policy,
    ProtectionStatus,
    ServiceStatus,
    ShutDown,
    Status,
    Vtpm,
)
from vtpm.wire.api_images import AllowedImage, Image, Launch, Launches
from vtpm.wire.api_migrations import Migration, Phase
from vtpm.wire.api_peers import HostCertificate, PeerInfo
from vtpm.wire.api_platform import EnrolledPlatform, Enrolment, PlatformFile

UUID_1 = UUID("6ad77c2a-96b5-4b26-8c8d-2f9ba4e8a4fe")
VM_UUID = UUID("0d5a6f5e-3a52-4a2c-9c0d-55f0a6a4b1aa")
STOPPED = Vtpm(
    name="web1",
    uuid=UUID_1,
    owner=Owner(0, 0),
    vm_uuid=VM_UUID,
    tpm_version=TpmVersion.V2_0,
    domain=DomainName.PROCESS,
    state=LifeState.STOPPED,
    epoch=1,
    version=7,
    measurement="",
    control_socket="",
    tcti="",
    created_at="2026-07-01T10:00:00Z",
)
RUNNING = replace(
    STOPPED,
    state=LifeState.RUNNING,
    measurement="ab" * 32,
    control_socket="/run/vtpm/guests/web1/sock.ctrl",
    tcti="swtpm:path=/run/vtpm/guests/web1/sock",
    pid=4711,
)
IN_USE = replace(RUNNING, client=Client("emulator", 1234, 0))
LOCKED = replace(RUNNING, lockout=Lockout("2026-07-01T11:00:00+00:00", 3, 3, 1000))
STATUS = Status(
    version="0.1.0",
    api_version=1,
    state_dir="/var/lib/vtpm",
    run_dir="/run/vtpm",
    vtpms=2,
    running=1,
    platform=PlatformStatus("embedded", "embedded", "IBM", "sha256:0,7", "unprotected", True),
    services=[ServiceStatus("vtpm-keeper", True, 12, ""), ServiceStatus("vtpm-launcher", False, None, "ended")],
    confinement=[ProtectionStatus("seccomp", "in_force", "")],
    warnings=["the store is nearly full"],
)


PCR_0, PCR_7 = "11" * 32, "22" * 32
RECOVERY_KEY = "VTPM-RECOVERY-KEY-1\nAAAA-BBBB"
PUBLIC_KEY = "VTPM-RECOVERY-PUBLIC-1-CCCC-DDDD"
FINGERPRINT = "7B2J-0000"
BACKUP = b"a backup"
IMAGE = Image("process", "ab" * 32, "first", "0.9.2", "allowed", "2026-07-01T10:00:00Z", ["web1", "web2"])
MOVED = Migration(UUID_1, "web1", "moved", 2, "host-b", Phase.OVER, "")
LEAVING = Migration(VM_UUID, "web2", "frozen", 4, "host-c", Phase.UNDECIDED, "host-c does not answer")
PEER = PeerInfo("host-b", "https://192.0.2.7:8000", "ee" * 32)
ENROLLED = EnrolledPlatform("host-b", "hardware", "000b" + "cd" * 32, "2028-07-01T10:00:00+00:00", "test authority")
POLICY_FILE = 'bank = "sha256"\n'
REQUEST = '{"form": "a request"}\n'
CERTIFICATE = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
LAUNCHES = Launches(
    bank="sha256",
    pcr=12,
    value="cc" * 32,
    start="00" * 32,
    entries=[Launch("process", "ab" * 32, "first", ""), Launch("", "", "", "dd" * 32)],
    replays=True,
    doubt="something else extended PCR 12",
    log="/run/vtpm/launches/event_log",
)


def event(number: int) -> AuditEvent:
    """Return an audit event with that id."""
    return AuditEvent(number, "2026-07-01T10:00:00Z", 0, "vtpm.started", "web1", {"pid": number, "by": "cli"})


@dataclass(frozen=True)
class Asked:
    """One request as it came; `path` as written on the wire."""

    method: str
    path: str
    body: Any


@dataclass
class CannedManager:
    """What the server answers from, and what it was asked.

    Args:
        answer: an answer to everything, as HTTP status, body and announced length; None for the usual ones.
    """

    socket_path: Path
    vtpms: dict[str, Vtpm] = field(default_factory=dict)
    status: Status = STATUS
    policy: Policy = field(
        default_factory=lambda: Policy("sha256:0,7", [PcrSet("set-up", [PCR_0, PCR_7], True)], [PCR_0, PCR_7])
    )
    images: list[Image] = field(default_factory=lambda: [IMAGE])
    migrations: list[Migration] = field(default_factory=lambda: [MOVED, LEAVING])
    launches: Launches = field(default_factory=lambda: LAUNCHES)
    recovered_with: str = ""
    evidence: str = "{}"
    events: list[AuditEvent] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    answer: tuple[int, bytes, int] | None = None
    confirmed: str = ""
    control_socket: str = RUNNING.control_socket
    after_looks: dict[str, tuple[int, Vtpm]] = field(default_factory=dict)
    """What a vTPM becomes once it has been looked at so often."""
    used_at_stop: dict[str, Vtpm] = field(default_factory=dict)
    """What a vTPM has become when it is to be stopped, which is refused then."""
    release: threading.Event = field(default_factory=threading.Event)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def answer_with(self, http_status: int, value: object, length: int | None = None) -> None:
        """Answer everything with this: bytes as they are, else as JSON."""
        body = value if isinstance(value, bytes) else to_json(value)
        self.answer = (http_status, body, len(body) if length is None else length)

    def fail_with(self, code: str, message: str = "web1 is broken", next_step: str = "Mend it") -> None:
        """Answer everything with an error."""
        self.answer_with(HTTP_STATUS.get(code, 500), ApiError(code, message, next_step))

    def add_event(self, new: AuditEvent) -> None:
        """Add an audit event and answer who waits for it."""
        with self.changed:
            self.events.append(new)
            self.changed.notify_all()

    def methods(self) -> list[str]:
        """Return what was asked, as words like "POST /v1/vtpms/web1/start"."""
        return [f"{one.method} {one.path}" for one in self.asked]

    def handle(self, method: str, path: str, body: Any) -> tuple[int, object]:
        """Return the usual answer to a request as HTTP status and value, None for none."""
        parts = urllib.parse.urlsplit(path)
        words = [urllib.parse.unquote(word) for word in parts.path.split("/")][2:]
        match [method, *words]:
            case ["GET", "status"]:
                return 200, self.status
            case ["GET", "vtpms"]:
                after = dict(urllib.parse.parse_qsl(parts.query)).get("after", "")
                return 200, [self.vtpms[name] for name in sorted(self.vtpms) if name > after][:MAX_VTPMS]
            case ["POST", "vtpms"]:
                if body["name"] in self.vtpms:
                    raise ConflictError(f"{body['name']} exists already", next_step="Take another name")
                vm_uuid = body["vm_uuid"] and UUID(body["vm_uuid"])
                new = replace(
                    STOPPED,
                    name=body["name"],
                    vm_uuid=vm_uuid,
                    tpm_version=TpmVersion(body["tpm_version"]),
                    domain=DomainName(body["domain"]),
                )
                self.vtpms[new.name] = new
                return 201, new
            case ["POST", "shutdown"]:
                return 200, ShutDown([v.name for v in self.vtpms.values() if v.state is LifeState.RUNNING])
            case ["GET", "events"]:
                query = {key: int(value) for key, value in urllib.parse.parse_qsl(parts.query)}
                return 200, self._events(**query)
            case ["GET", "policy"]:
                return 200, self.policy
            case ["POST", "policy"]:
                self.policy.sets.append(PcrSet(body["label"], body["values"], False))
                return 201, self.policy
            case ["DELETE", "policy", label]:
                self.policy.sets[:] = [found for found in self.policy.sets if found.label != label]
                return 200, self.policy
            case ["GET", "images"]:
                return 200, self.images
            case ["POST", "images"]:
                allowed = replace(
                    IMAGE, measurement=body["measurement"], label=body["label"], kind=body["kind"] or "process"
                )
                self.images.append(allowed)
                return 201, AllowedImage(allowed, ["its libtpms is old"])
            case ["POST", "images", "retire"]:
                return 200, replace(IMAGE, measurement=body["measurement"], state="retired")
            case ["GET", "launches"]:
                return 200, self.launches
            case ["POST", "recovery-key"]:
                return 201, NewRecoveryKey(RECOVERY_KEY, PUBLIC_KEY, FINGERPRINT)
            case ["POST", "recovery-key", "confirm"]:
                self.confirmed = body["public_key"]
                return 204, None
            case ["POST", "recover"]:
                self.recovered_with = body["recovery_key"]
                return 200, self.status
            case ["POST", "vtpms", name, "export"]:
                found = self._find(name)
                sealed_to = "" if body["passphrase"] else FINGERPRINT
                encoded = base64.b64encode(BACKUP).decode()
                return 200, ExportedVtpm(name, found.uuid, found.epoch, "2026-07-01T10:00:00Z", sealed_to, encoded)
            case ["GET", "peers"]:
                return 200, [PEER]
            case ["POST", "peers"]:
                return 201, replace(PEER, name=body["name"], url=body["url"])
            case ["DELETE", "peers", _]:
                return 204, None
            case ["GET", "certificate"]:
                return 200, HostCertificate(CERTIFICATE)
            case ["GET", "platform"]:
                return 200, ENROLLED
            case ["POST", "platform", "enrolment"]:
                return 200, Enrolment(body["name"], "hardware", "ab" * 32, REQUEST)
            case ["POST", "platform", "evidence"]:
                return 200, PlatformFile(self.evidence)
            case ["GET", "platform", "policy"]:
                return 200, PlatformFile(POLICY_FILE)
            case ["POST", "platform", "certificate"]:
                return 201, ENROLLED
            case ["GET", "migrations"]:
                return 200, self.migrations
            case ["POST", "vtpms", name, "migrate"]:
                left = replace(MOVED, name=self._find(name).name, peer=body["to"])
                ready = replace(left, right="held", epoch=1, phase=Phase.READY)
                return 200, left if body["guest"] == "none" else ready
            case ["POST", "vtpms", name, "migrate", "arrived"]:
                return 200, replace(MOVED, name=self._find(name).name)
            case ["POST", "vtpms", name, "receive"]:
                return 200, replace(self._find(name), state="inert")
            case ["POST", "vtpms", name, "migrate", "abort"]:
                return 200, replace(MOVED, name=self._find(name).name, right="held", epoch=3)
            case ["POST", "vtpms", name, "migrate", "discard"]:
                return 200, replace(MOVED, name=self._find(name).name, right="absent")
            case ["POST", "vtpms", name, "adopt"]:
                return 200, replace(MOVED, name=self._find(name).name, right="held")
            case ["POST", "import"]:
                return 201, self._put(replace(STOPPED, name=body["name"] or "web2", epoch=2))
            case ["POST", "import", "swtpm"]:
                return 201, self._put(replace(STOPPED, name=body["name"]))
            case ["GET", "vtpms", name]:
                found = self._find(name)
                if name in self.after_looks:
                    looks, later = self.after_looks[name]
                    self.after_looks[name] = (looks - 1, later)
                    if looks == 1:
                        self._put(later)
                return 200, found
            case ["DELETE", "vtpms", name]:
                del self.vtpms[self._find(name).name]
                return 204, None
            case ["POST", "vtpms", name, "start"]:
                return 200, self._put(
                    replace(
                        self._find(name),
                        state=LifeState.RUNNING,
                        control_socket=self.control_socket,
                        tcti=RUNNING.tcti,
                        measurement=RUNNING.measurement,
                    )
                )
            case ["POST", "vtpms", name, "stop"] if name in self.used_at_stop:
                self._put(self.used_at_stop[name])
                raise ConflictError(f"vTPM {name} is in use by a virtual machine")
            case ["POST", "vtpms", name, "stop"]:
                return 200, self._put(replace(self._find(name), state=LifeState.STOPPED, control_socket=""))
        raise AssertionError(f"no such request: {method} {path}")

    def _events(self, after: int, limit: int, wait_s: int) -> list[AuditEvent]:
        with self.changed:
            self.changed.wait_for(lambda: any(one.id > after for one in self.events), wait_s)
            return [one for one in self.events if one.id > after][:limit]

    def _find(self, name: str) -> Vtpm:
        try:
            return self.vtpms[name]
        except KeyError:
            raise NotFoundError(f"there is no vTPM {name}", next_step="See vtpm list") from None

    def _put(self, vtpm: Vtpm) -> Vtpm:
        self.vtpms[vtpm.name] = vtpm
        return vtpm


def to_json(value: object) -> bytes:
    """Return wire/api.py's objects as the manager writes them."""
    return json.dumps(value, default=lambda one: dataclasses.asdict(one) if _is_object(one) else str(one)).encode()


@contextmanager
def serve(manager: CannedManager) -> Iterator[None]:
    """Serve the manager's API at its socket; ended before it returns."""

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 20

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            manager.asked.append(Asked(self.command, self.path, body))
            if manager.answer is None:
                status, content, announced = self._usual(body)
            else:
                status, content, announced = manager.answer
            if status == 0:
                # As if the manager hung: until the test is over.
                manager.release.wait(self.timeout)
                return
            self.send_response(status)
            self.send_header("Content-Length", str(announced))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_DELETE = do_GET

        def _usual(self, body: Any) -> tuple[int, bytes, int]:
            try:
                status, value = manager.handle(self.command, self.path, body)
            except VtpmError as error:
                status = HTTP_STATUS.get(error.code, 500)
                value = ApiError(error.code, error.message, error.next_step)
            content = b"" if value is None else to_json(value)
            return status, content, len(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        request_queue_size = 16

        def handle_error(self, request: object, client_address: object) -> None:
            # A client that goes in the middle, as one that follows events does.
            pass

    with Server(str(manager.socket_path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield
        finally:
            manager.release.set()
            with manager.changed:
                # Ends every wait for events.
                manager.events.append(event(1_000_000))
                manager.changed.notify_all()
            server.shutdown()
            thread.join(10)


def _is_object(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
