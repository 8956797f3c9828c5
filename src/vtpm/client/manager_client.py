"""The manager's API as methods: wire/api.py's requests out, its dataclasses or vtpm's own errors back.

For the command line and for other programs that look after vTPMs; knows HTTP, JSON and the socket, and nothing else of
the manager. Not safe to share between threads.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import ssl
import types
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias
from uuid import UUID

import httpx

from vtpm import errors
from vtpm.client.decode import decode
from vtpm.errors import AccessDeniedError, ProtocolError, UnavailableError, UsageError, VtpmError
from vtpm.tpm.types import Make, Startup, TpmVersion
from vtpm.wire.api import (
    MANAGER_SOCKET,
    MAX_VTPMS,
    AllowPcrs,
    ApiError,
    AuditEvent,
    ConfirmRecoveryKey,
    CreateVtpm,
    DomainName,
    ExportedVtpm,
    ExportVtpm,
    ImportBackup,
    ImportSwtpm,
    NewRecoveryKey,
    Policy,
    RecoveryKeyText,
    ShutDown,
    StartVtpm,
    Status,
    StopVtpm,
    Vtpm,
)
from vtpm.wire.api_images import AllowedImage, AllowImage, Image, Launches, RetireImage
from vtpm.wire.api_migrations import AdoptVtpm, Guest, MigrateVtpm, Migration, ReceiveVtpm
from vtpm.wire.api_peers import AddPeer, HostCertificate, PeerInfo
from vtpm.wire.api_platform import EnrolledPlatform, Enrolment, KeepCertificate, NewEnrolment, PlatformFile
from vtpm.wire.paths import default_run_dir

SOCKET_VARIABLE = "VTPM_SOCKET"
DEFAULT_TIMEOUT_S = 60.0
MIGRATION_TIMEOUT_S = 180.0
SHUTDOWN_TIMEOUT_S = 600.0
MAX_REPLY_BYTES = 16 * 1024 * 1024
MAX_EVENT_WAIT_S = 30
LOOK_TIMEOUT_S = 180.0
"""For what looks at each kind of domain first, which may try out how virtual machines run."""
EVENTS_PER_PAGE = 100

Vtpms: TypeAlias = list[Vtpm]
AuditEvents: TypeAlias = list[AuditEvent]
Migrations: TypeAlias = list[Migration]
Peers: TypeAlias = list[PeerInfo]
Images: TypeAlias = list[Image]
# Aliases, for in the class below `list` is a method.
Body: TypeAlias = (
    CreateVtpm
    | StartVtpm
    | StopVtpm
    | AllowPcrs
    | AllowImage
    | RetireImage
    | MigrateVtpm
    | ReceiveVtpm
    | AdoptVtpm
    | AddPeer
    | NewEnrolment
    | KeepCertificate
    | ConfirmRecoveryKey
    | RecoveryKeyText
    | ExportVtpm
    | ImportBackup
    | ImportSwtpm
)

_START_IT = "Start it: vtpm-managerd, or systemctl start vtpm-managerd"
_ERRORS: Mapping[str, type[VtpmError]] = {
    kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VtpmError)
}


def default_socket(uid: int, environ: Mapping[str, str]) -> Path:
    """Return the manager's socket: $VTPM_SOCKET, or the one in the default run directory.

    Raises:
        UsageError: neither is known.
    """
    named = environ.get(SOCKET_VARIABLE)
    return Path(named) if named else default_run_dir(uid, environ) / MANAGER_SOCKET


class ManagerClient:
    """One connection to a manager; a context manager that closes it.

    Every method raises the error that the manager reports, by its code, and besides:
        UnavailableError: nobody answers at the socket, or not in time; the same call may go through later.
        AccessDeniedError: the caller may not open the socket.
        ProtocolError: the answer is not what wire/api.py says.

    Args:
        socket_path: the manager's socket; default_socket() when None.
        timeout_s: longest wait for an answer, in seconds.
    """

    def __init__(self, socket_path: Path | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.socket_path = socket_path or default_socket(os.geteuid(), os.environ)
        self.timeout_s = timeout_s
        # An empty TLS context, for the default one reads all certificates of the system and none is needed here.
        transport = httpx.HTTPTransport(uds=str(self.socket_path), verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        self._http = httpx.Client(
            transport=transport,
            base_url="http://vtpm",
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            # A proxy or .netrc of the environment has no say in who the manager is.
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calling it twice is harmless."""
        self._http.close()

    def status(self) -> Status:
        """Return the host's services, platform TPM and warnings."""
        return decode(Status, self._request("GET", "/v1/status"), "the status")

    def list(self) -> Vtpms:
        """Return the vTPMs that the caller may see, by name; the manager gives them page by page."""
        found: Vtpms = []
        while True:
            query = urllib.parse.urlencode({"after": found[-1].name if found else ""})
            page = decode(Vtpms, self._request("GET", f"/v1/vtpms?{query}"), "the list of vTPMs")
            if found and page and page[0].name <= found[-1].name:
                raise ProtocolError("the manager's list of vTPMs is not in order")
            found += page
            if len(page) < MAX_VTPMS:
                return found

    def create(
        self,
        name: str,
        tpm_version: TpmVersion = TpmVersion.V2_0,
        domain: DomainName = DomainName.PROCESS,
        vm_uuid: UUID | None = None,
        make: Make = Make.LIBTPMS,
    ) -> Vtpm:
        """Make a vTPM; it is stopped and has no state until it is first started.

        Raises:
            UsageError: a name or a combination that cannot be.
            ConflictError: the name is taken.
        """
        _path_of(name)
        body = CreateVtpm(name, tpm_version, domain, vm_uuid, make)
        return self._vtpm(self._request("POST", "/v1/vtpms", body))

    def show(self, name: str) -> Vtpm:
        """Return one vTPM.

        Raises:
            NotFoundError: there is none of that name that the caller may see.
        """
        return self._vtpm(self._request("GET", _path_of(name)))

    def start(self, name: str, startup: Startup = Startup.NONE) -> Vtpm:
        """Start a vTPM and power it on; returns once it answers.

        Raises:
            ConflictError: it is not stopped.
        """
        return self._vtpm(self._request("POST", f"{_path_of(name)}/start", StartVtpm(startup)))

    def stop(self, name: str, *, force: bool = False) -> Vtpm:
        """Stop a vTPM in order; returns once its state is kept.

        Args:
            force: also when a virtual machine uses it, which then has no TPM any more.
        Raises:
            ConflictError: it is not running, or in use by a virtual machine.
        """
        return self._vtpm(self._request("POST", f"{_path_of(name)}/stop", StopVtpm(force)))

    def delete(self, name: str) -> None:
        """Delete a vTPM for ever, its key with it.

        Raises:
            ConflictError: it is not stopped.
        """
        self._request("DELETE", _path_of(name))

    def export(self, name: str, to: ExportVtpm) -> ExportedVtpm:
        """Return a stopped vTPM as a backup.

        Raises:
            ConflictError: it is not stopped, or was never started.
            UsageError: this host has no recovery key, and neither a public one nor a passphrase is given.
        """
        answer = self._request("POST", f"{_path_of(name)}/export", to)
        return decode(ExportedVtpm, answer, "the backup")

    def migrate(self, name: str, to: str, domain: DomainName | None = None, guest: Guest = Guest.NONE) -> Migration:
        """Move a stopped vTPM to a peer, and return once it is there; or let one that runs leave with its guest.

        Args:
            domain: what it is to live in there; None: what it lives in here, if the peer has such.
            guest: what it moves with; with any, it returns when the peer has proven itself and the guest may go.
        Raises:
            AttestationError: the peer is not what policy asks for; the vTPM is as it was.
            ConflictError: it is not stopped, or the peer does not take it; it is as it was.
            UnavailableError: the peer does not answer; the message says whether the vTPM is as it was, or frozen.
        """
        answer = self._request(
            "POST",
            f"{_path_of(name)}/migrate",
            MigrateVtpm(to, domain, guest),
            read_s=max(self.timeout_s, MIGRATION_TIMEOUT_S),
        )
        return decode(Migration, answer, "the migration")

    def arrived(self, name: str) -> Migration:
        """Say that the guest of a vTPM has arrived at its destination and is paused there; returns once it may go on.

        Raises:
            ConflictError: no such move is under way.
            UnavailableError: the destination does not answer.
        """
        path = f"{_path_of(name)}/migrate/arrived"
        answer = self._request("POST", path, read_s=max(self.timeout_s, MIGRATION_TIMEOUT_S))
        return decode(Migration, answer, "the migration")

    def receive(self, name: str, wanted: ReceiveVtpm) -> Vtpm:
        """Have an instance wait for a vTPM that is to arrive with its guest, whose emulator is to be started on it.

        Raises:
            ConflictError: there is a vTPM of this name or uuid, or it is expected already.
        """
        answer = self._request("POST", f"{_path_of(name)}/receive", wanted, read_s=max(self.timeout_s, LOOK_TIMEOUT_S))
        return decode(Vtpm, answer, "the vTPM")

    def abort_migration(self, name: str) -> Migration:
        """Take back a vTPM that is frozen on its way. Raises ConflictError: it is not, or has moved."""
        answer = self._request("POST", f"{_path_of(name)}/migrate/abort", read_s=max(self.timeout_s, 60.0))
        return decode(Migration, answer, "the migration")

    def discard_arrival(self, name: str) -> Migration:
        """Destroy an inert vTPM, which is then its source's alone. Raises ConflictError: it is not inert."""
        answer = self._request("POST", f"{_path_of(name)}/migrate/discard")
        return decode(Migration, answer, "the migration")

    def adopt(self, name: str, *, source_is_lost: bool) -> Migration:
        """Take an inert vTPM for this host's own. Raises ConflictError: it is not inert."""
        answer = self._request("POST", f"{_path_of(name)}/adopt", AdoptVtpm(source_is_lost))
        return decode(Migration, answer, "the migration")

    def migrations(self) -> Migrations:
        """Return what this host holds of each vTPM that has moved, or is moving."""
        return decode(Migrations, self._request("GET", "/v1/migrations"), "the migrations")

    def add_peer(self, name: str, url: str, certificate: str) -> PeerInfo:
        """Name a host that vTPMs may move to and come from, or change what is known of it.

        Args:
            url: https://HOST:PORT.
            certificate: PEM.
        Raises:
            UsageError: name, URL or certificate are none.
            ConflictError: another peer has that URL or certificate, or there are as many as there can be.
        """
        return decode(PeerInfo, self._request("POST", "/v1/peers", AddPeer(name, url, certificate)), "the peer")

    def peers(self) -> Peers:
        """Return the hosts that vTPMs may move to and come from."""
        return decode(Peers, self._request("GET", "/v1/peers"), "the peers")

    def remove_peer(self, name: str) -> None:
        """Name a peer no more. Raises NotFoundError: there is none of that name."""
        self._request("DELETE", f"/v1/peers/{urllib.parse.quote(name, safe='')}")

    def host_certificate(self) -> str:
        """Return this host's own certificate, PEM, for its peers."""
        return decode(HostCertificate, self._request("GET", "/v1/certificate"), "the certificate").certificate

    def request_enrolment(self, name: str) -> Enrolment:
        """Return a request to an enrolment authority, to certify this host's platform under a name.

        Raises:
            UsageError: it is no name.
            PlatformTpmError: the platform TPM does not answer, or the root key is not open.
        """
        answer = self._request("POST", "/v1/platform/enrolment", NewEnrolment(name))
        return decode(Enrolment, answer, "the request")

    def keep_certificate(self, certificate: str) -> EnrolledPlatform:
        """Have this host keep the certificate that an authority has sealed for its platform.

        Args:
            certificate: content of the file that `vtpm authority certify` has made.
        Raises:
            UsageError: it is none.
            AttestationError: it is another platform's, or was changed.
        """
        answer = self._request("POST", "/v1/platform/certificate", KeepCertificate(certificate))
        return decode(EnrolledPlatform, answer, "the platform")

    def platform_evidence(self) -> str:
        """Return this host's evidence over a fresh nonce, as a file.

        Raises:
            NotFoundError: its platform is not enrolled, or it has no platform policy.
            PlatformTpmError: the platform TPM does not answer, or the root key is not open.
        """
        return decode(PlatformFile, self._request("POST", "/v1/platform/evidence"), "the evidence").content

    def platform_policy(self) -> str:
        """Return the file of a platform policy that this host passes as it is now. Raises as platform_evidence."""
        return decode(
            PlatformFile, self._request("GET", "/v1/platform/policy", read_s=LOOK_TIMEOUT_S), "the policy"
        ).content

    def enrolled(self) -> EnrolledPlatform:
        """Return as what this host's platform is enrolled. Raises NotFoundError: it is not."""
        return decode(EnrolledPlatform, self._request("GET", "/v1/platform"), "the platform")

    def import_backup(self, wanted: ImportBackup) -> Vtpm:
        """Make a vTPM of a backup; it is stopped.

        Raises:
            StateError: the backup is damaged, or sealed to another key or passphrase.
            ConflictError: its name or uuid is taken.
        """
        return self._vtpm(self._request("POST", "/v1/import", wanted))

    def import_swtpm(self, wanted: ImportSwtpm) -> Vtpm:
        """Make a vTPM that begins with the state of an swtpm; it is stopped.

        Raises:
            ConflictError: the name is taken.
        """
        return self._vtpm(self._request("POST", "/v1/import/swtpm", wanted))

    def events(self, after: int = 0, limit: int = EVENTS_PER_PAGE, wait_s: int = 0) -> AuditEvents:
        """Return up to `limit` audit events with ids above `after`, oldest first.

        Args:
            wait_s: how long the manager may wait for the first one, 0 to MAX_EVENT_WAIT_S seconds.
        """
        query = {"after": after, "limit": limit, "wait_s": wait_s}
        answer = self._request("GET", f"/v1/events?{urllib.parse.urlencode(query)}", read_s=self.timeout_s + wait_s)
        return decode(list[AuditEvent], answer, "the events")

    def all_events(self, after: int = 0) -> Iterator[AuditEvent]:
        """Yield the audit events that are there now, page by page, oldest first."""
        while page := self.events(after):
            after = _last_id(page, after)
            yield from page

    def follow_events(self, after: int = 0) -> Iterator[AuditEvent]:
        """Yield audit events with ids above `after`, oldest first, then wait for more; never ends by itself."""
        while True:
            page = self.events(after, wait_s=MAX_EVENT_WAIT_S)
            if page:
                after = _last_id(page, after)
                yield from page

    def policy(self) -> Policy:
        """Return the PCR values under which the root key opens."""
        return self._policy(self._request("GET", "/v1/policy"))

    def policy_allow(self, label: str, values: Sequence[str]) -> Policy:
        """Have the root key open under further PCR values, hex in the selection's order.

        Raises:
            UsageError: values that are not of the selection's form.
            ConflictError: the label is taken, or there are as many sets as there can be.
        """
        return self._policy(self._request("POST", "/v1/policy", AllowPcrs(label, [*values])))

    def policy_drop(self, label: str) -> Policy:
        """Have the root key open under these PCR values no more.

        Raises:
            NotFoundError: there is no such set.
            ConflictError: it is the last one.
        """
        return self._policy(self._request("DELETE", f"/v1/policy/{urllib.parse.quote(label, safe='')}"))

    def images(self) -> Images:
        """Return the images that are known to this host: what may run vTPMs, and what may no more."""
        return decode(Images, self._request("GET", "/v1/images"), "the images")

    def allow_image(self, measurement: str, label: str, kind: str | None = None) -> AllowedImage:
        """Let an image run vTPMs.

        Args:
            kind: of domain; None: that which would run this image now.
        Raises:
            UsageError: no kind was given, and none would run it now; or the label is not one.
        """
        answer = self._request("POST", "/v1/images", AllowImage(measurement, label, kind))
        return decode(AllowedImage, answer, "the image")

    def retire_image(self, measurement: str) -> Image:
        """Let an image run no vTPM any more. Raises ConflictError: it runs one. NotFoundError: it is not known."""
        return decode(Image, self._request("POST", "/v1/images/retire", RetireImage(measurement)), "the image")

    def launches(self) -> Launches:
        """Return what was launched in this boot, by the keeper's log, and whether the PCR says so too."""
        return decode(Launches, self._request("GET", "/v1/launches"), "the launches")

    def new_recovery_key(self) -> NewRecoveryKey:
        """Make a recovery key, which is kept nowhere; an earlier one counts until this one is confirmed."""
        return decode(NewRecoveryKey, self._request("POST", "/v1/recovery-key"), "the recovery key")

    def confirm_recovery_key(self, public_key: str) -> None:
        """Say that somebody has the recovery key that was made last; an earlier one opens nothing any more.

        Args:
            public_key: text of its public half.
        Raises:
            NotFoundError: it is not the one that was made last.
        """
        self._request("POST", "/v1/recovery-key/confirm", ConfirmRecoveryKey(public_key))

    def recover(self, recovery_key: str) -> Status:
        """Open the vault by the recovery key and seal the root key to the platform TPM as it is now.

        Raises:
            ConflictError: the root key is open.
            StateError: it is another key, or nothing was escrowed to it.
        """
        body = RecoveryKeyText(recovery_key)
        return decode(Status, self._request("POST", "/v1/recover", body), "the status")

    def shutdown(self) -> ShutDown:
        """Stop every vTPM in order, then all host services; returns what was stopped."""
        answer = self._request("POST", "/v1/shutdown", read_s=max(self.timeout_s, SHUTDOWN_TIMEOUT_S))
        return decode(ShutDown, answer, "what the shutdown stopped")

    def _policy(self, answer: Any) -> Policy:
        return decode(Policy, answer, "the policy")

    def _vtpm(self, answer: Any) -> Vtpm:
        return decode(Vtpm, answer, "the vTPM")

    def _request(self, method: str, path: str, body: Body | None = None, read_s: float | None = None) -> Any:
        content = None if body is None else json.dumps(dataclasses.asdict(body), default=str).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        read_s = read_s or self.timeout_s
        timeout = httpx.Timeout(self.timeout_s, read=read_s)
        self._check_reachable()
        try:
            with self._http.stream(method, path, content=content, headers=headers, timeout=timeout) as response:
                answer = self._read(response)
        except httpx.TimeoutException as error:
            raise UnavailableError(
                f"the manager at {self.socket_path} did not answer in {read_s:.0f} s",
                next_step="What was asked may still happen: look with vtpm list, and in the log of vtpm-managerd",
            ) from error
        except httpx.TransportError as error:
            raise UnavailableError(
                f"the manager at {self.socket_path} broke off its answer: {error}",
                next_step=f"What was asked may have happened: look with vtpm list. {_START_IT}, if it has ended",
            ) from error
        if response.is_success:
            return answer
        raise self._reported(answer, response.status_code)

    def _read(self, response: httpx.Response) -> Any:
        body = bytearray()
        # Raw, so that no content encoding can make much of little.
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > MAX_REPLY_BYTES:
                raise ProtocolError(f"the manager at {self.socket_path} answers with over {MAX_REPLY_BYTES} bytes")
        if not body and response.is_success:
            return None
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise self._foreign(f"answered HTTP {response.status_code} with what is not JSON") from None

    def _reported(self, answer: Any, http_status: int) -> VtpmError:
        try:
            error = decode(ApiError, answer, "the error")
        except ProtocolError:
            return self._foreign(f"answered HTTP {http_status} without saying what is wrong")
        return _ERRORS.get(error.code, VtpmError)(error.message, next_step=error.next_step)

    def _foreign(self, what: str) -> ProtocolError:
        return ProtocolError(
            f"the manager at {self.socket_path} {what}",
            next_step="See that vtpm-managerd, of this version, and nothing else serves that socket",
        )

    def _check_reachable(self) -> None:
        # httpcore hides why a connect failed, and leaves that socket open until it is collected.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(self.timeout_s)
            try:
                probe.connect(os.fspath(self.socket_path))
            except PermissionError as error:
                raise AccessDeniedError(
                    f"uid {os.geteuid()} may not use the manager at {self.socket_path}",
                    next_step="Ask as root or as a user whom the socket's group lets in",
                ) from error
            except OSError as error:
                reason = error.strerror or str(error)
                raise UnavailableError(
                    f"no manager answers at {self.socket_path}: {reason}", next_step=_START_IT
                ) from error


def _last_id(page: list[AuditEvent], after: int) -> int:
    last = page[-1].id
    if last <= after:
        raise ProtocolError(f"the events after {after} end with {last}")
    return last


def _path_of(name: str) -> str:
    if not name:
        raise UsageError("the name of a vTPM is empty")
    try:
        # The dots too: a URL ending in ".." would be shortened on its way.
        return "/v1/vtpms/" + urllib.parse.quote(name, safe="").replace(".", "%2E")
    except UnicodeEncodeError:
        raise UsageError(f"the name {name!r} is not UTF-8") from None
