"""The HTTP API over the service: routes, errors as JSON, and who the caller is. See vtpm.wire.api."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated

from fastapi import Body, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from vtpm.errors import UsageError, VtpmError
from vtpm.manager.access import Caller
from vtpm.manager.backups import BackupService
from vtpm.manager.enrolment import EnrolmentService
from vtpm.manager.migrations import MigrationService
from vtpm.manager.peering import Peering
from vtpm.manager.platform import PlatformService
from vtpm.manager.service import ManagerService
from vtpm.wire.api import (
    HTTP_STATUS,
    MAX_VTPMS,
    AllowPcrs,
    ApiError,
    AuditEvent,
    ConfirmRecoveryKey,
    CreateVtpm,
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
from vtpm.wire.api_migrations import AdoptVtpm, MigrateVtpm, Migration, ReceiveVtpm
from vtpm.wire.api_peers import AddPeer, HostCertificate, PeerInfo
from vtpm.wire.api_platform import EnrolledPlatform, Enrolment, KeepCertificate, NewEnrolment, PlatformFile

MAX_BODY_BYTES = 16 * 1024
MAX_IMPORT_BODY_BYTES = 10 * 1024 * 1024
"""In base64: the largest backup, or all states of one swtpm."""
IMPORT_PATHS = ("/v1/import", "/v1/import/swtpm")
MAX_EVENTS = 1000
MAX_NAME_CHARS = 63
MAX_WAIT_S = 30.0
MAX_UNDER_WAY = 4
"""Requests of one ordinary user."""


def _caller(request: Request) -> Caller:
    # The server's protocol class puts "uid:gid" there, from SO_PEERCRED; see manager.http_server.
    uid, _, gid = (request.client.host if request.client else "").partition(":")
    caller: Caller = request.app.state.caller_of(int(uid), int(gid))
    return caller


By = Annotated[Caller, Depends(_caller)]


async def _in_turn(request: Request, who: By) -> AsyncIterator[None]:
    """Let few requests of an ordinary user be under way at once: guests' saves wait in the same queue of the store."""
    if who.is_admin:
        yield
        return
    slots: dict[int, asyncio.Semaphore] = request.app.state.slots
    async with slots.setdefault(who.uid, asyncio.Semaphore(MAX_UNDER_WAY)):
        yield


def make_app(
    service: ManagerService,
    platform: PlatformService,
    backups: BackupService,
    migrations: MigrationService,
    peering: Peering,
    enrolment: EnrolmentService,
    caller_of: Callable[[int, int], Caller],
    shut_down: Callable[[], None],
) -> FastAPI:
    """Make the ASGI application.

    Args:
        service: does the work on vTPMs.
        platform: does the work on the root key.
        backups: does the work on backups.
        migrations: does the work on moves.
        peering: does the work on peers.
        enrolment: does the work on who the platform is.
        caller_of: says who a uid and gid is.
        shut_down: ends the host's services, once the reply to a shutdown is on its way.
    """
    app = FastAPI(title="vtpm-managerd", version="1", docs_url=None, redoc_url=None)

    app.state.caller_of = caller_of
    app.state.slots = {}

    @app.middleware("http")
    async def bounded(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        limit = MAX_BODY_BYTES
        if request.scope["path"] in IMPORT_PATHS:
            # Before the body is read: nobody else is to fill this process's memory.
            if not _caller(request).is_admin:
                return _error("access_denied", "only administrators may import vTPMs", "Ask as root")
            limit = MAX_IMPORT_BODY_BYTES
        length = request.headers.get("content-length", "0")
        chunked = "transfer-encoding" in request.headers
        if chunked or not length.isdecimal() or int(length) > limit:
            return _error("usage", f"a request's body must have a length, at most {limit} bytes")
        if not request.scope["path"].isprintable():
            # The router would pass over a newline at the end, and take another name for it.
            return _error("usage", f"{request.scope['path']!r} has characters that no name has")
        return await call_next(request)

    @app.exception_handler(VtpmError)
    async def on_vtpm_error(_: Request, error: VtpmError) -> JSONResponse:
        return _error(error.code, error.message, error.next_step)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first.get("loc", ())[1:])
        return _error("usage", f"the request's {where or 'body'} is not valid: {first.get('msg', '')}")

    @app.exception_handler(HTTPException)
    async def on_http(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(
            {"code": "usage", "message": f"the request is not one of this API: {error.detail}", "next_step": ""},
            error.status_code,
        )

    # What needs the vault waits for it here, or hears why it is not open.
    vault = [Depends(_in_turn), Depends(service.door.opened)]

    # Names are matched as paths: a client's "../x" must be refused as a name, not as an unknown route.

    @app.get("/v1/status")
    async def status(who: By) -> Status:
        return await service.status(who)

    @app.get("/v1/vtpms", dependencies=vault)
    async def list_vtpms(
        who: By,
        after: Annotated[str, Query(max_length=MAX_NAME_CHARS)] = "",
        limit: Annotated[int, Query(ge=1, le=MAX_VTPMS)] = MAX_VTPMS,
    ) -> list[Vtpm]:
        return list(await service.list(after, limit, who))

    @app.post("/v1/vtpms", status_code=201, dependencies=vault)
    async def create(wanted: CreateVtpm, who: By) -> Vtpm:
        return await service.create(wanted, who)

    @app.get("/v1/vtpms/{name:path}", dependencies=vault)
    async def show(name: str, who: By) -> Vtpm:
        return await service.show(name, who)

    @app.delete("/v1/vtpms/{name:path}", status_code=204, dependencies=vault)
    async def delete(name: str, who: By) -> None:
        await service.delete(name, who)

    @app.post("/v1/vtpms/{name:path}/start", dependencies=vault)
    async def start(name: str, who: By, how: Annotated[StartVtpm | None, Body()] = None) -> Vtpm:
        return await service.start(name, (how or StartVtpm()).startup, who)

    @app.post("/v1/vtpms/{name:path}/stop", dependencies=vault)
    async def stop(name: str, who: By, how: Annotated[StopVtpm | None, Body()] = None) -> Vtpm:
        return await service.stop(name, who, force=(how or StopVtpm()).force)

    @app.post("/v1/vtpms/{name:path}/export", dependencies=vault)
    async def export(name: str, who: By, wanted: Annotated[ExportVtpm | None, Body()] = None) -> ExportedVtpm:
        return await backups.export(name, wanted or ExportVtpm(), who)

    @app.post("/v1/vtpms/{name:path}/migrate", dependencies=vault)
    async def migrate(name: str, who: By, wanted: MigrateVtpm) -> Migration:
        return await migrations.migrate(name, wanted, who)

    @app.post("/v1/vtpms/{name:path}/migrate/arrived", dependencies=vault)
    async def arrived(name: str, who: By) -> Migration:
        return await migrations.arrived(name, who)

    @app.post("/v1/vtpms/{name:path}/receive", dependencies=vault)
    async def receive(name: str, who: By, wanted: ReceiveVtpm) -> Vtpm:
        return await migrations.receive_guest(name, wanted, who)

    @app.post("/v1/vtpms/{name:path}/migrate/abort", dependencies=vault)
    async def abort(name: str, who: By) -> Migration:
        return await migrations.abort(name, who)

    @app.post("/v1/vtpms/{name:path}/adopt", dependencies=vault)
    async def adopt(name: str, who: By, word: AdoptVtpm) -> Migration:
        if not word.source_is_lost:
            raise UsageError(
                "a vTPM is adopted only when its source is lost for good: else there may be two of one TPM",
                next_step="See that the source never comes back, then say --source-is-lost",
            )
        return await migrations.adopt(name, who)

    @app.post("/v1/vtpms/{name:path}/migrate/discard", dependencies=vault)
    async def discard(name: str, who: By) -> Migration:
        return await migrations.discard(name, who)

    @app.get("/v1/migrations", dependencies=vault)
    async def moves(who: By) -> list[Migration]:
        return list(await migrations.list(who))

    @app.get("/v1/certificate", dependencies=vault)
    async def certificate(who: By) -> HostCertificate:
        return await peering.certificate(who)

    @app.get("/v1/peers", dependencies=vault)
    async def peers(who: By) -> list[PeerInfo]:
        return list(await peering.list(who))

    @app.post("/v1/peers", status_code=201, dependencies=vault)
    async def add_peer(wanted: AddPeer, who: By) -> PeerInfo:
        return await peering.add(wanted, who)

    @app.delete("/v1/peers/{name:path}", status_code=204, dependencies=vault)
    async def remove_peer(name: str, who: By) -> None:
        await peering.remove(name, who)

    @app.get("/v1/platform", dependencies=vault)
    async def enrolled(who: By) -> EnrolledPlatform:
        return await enrolment.show(who)

    @app.post("/v1/platform/evidence", dependencies=vault)
    async def evidence(who: By) -> PlatformFile:
        return await enrolment.evidence(who)

    @app.get("/v1/platform/policy", dependencies=vault)
    async def own_policy(who: By) -> PlatformFile:
        return await enrolment.policy(who)

    @app.post("/v1/platform/enrolment", dependencies=vault)
    async def request_enrolment(wanted: NewEnrolment, who: By) -> Enrolment:
        return await enrolment.request(wanted, who)

    @app.post("/v1/platform/certificate", status_code=201, dependencies=vault)
    async def keep_certificate(given: KeepCertificate, who: By) -> EnrolledPlatform:
        return await enrolment.accept(given, who)

    @app.post("/v1/import", status_code=201, dependencies=vault)
    async def import_backup(wanted: ImportBackup, who: By) -> Vtpm:
        return await backups.import_backup(wanted, who)

    @app.post("/v1/import/swtpm", status_code=201, dependencies=vault)
    async def import_swtpm(wanted: ImportSwtpm, who: By) -> Vtpm:
        return await backups.import_swtpm(wanted, who)

    @app.get("/v1/events", dependencies=vault)
    async def events(
        who: By,
        after: Annotated[int, Query(ge=0, le=2**62)] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = 100,
        wait_s: Annotated[float, Query(ge=0, le=MAX_WAIT_S)] = 0,
    ) -> list[AuditEvent]:
        return list(await service.audit.list(after, limit, wait_s, who))

    @app.get("/v1/policy")
    async def policy(who: By) -> Policy:
        return await platform.policy(who)

    @app.post("/v1/policy", status_code=201, dependencies=vault)
    async def allow(wanted: AllowPcrs, who: By) -> Policy:
        return await platform.allow(wanted, who)

    @app.delete("/v1/policy/{label:path}", dependencies=vault)
    async def drop(label: str, who: By) -> Policy:
        return await platform.drop(label, who)

    @app.get("/v1/images", dependencies=vault)
    async def images(who: By) -> list[Image]:
        return await service.images.images(who)

    @app.post("/v1/images", status_code=201, dependencies=vault)
    async def allow_image(wanted: AllowImage, who: By) -> AllowedImage:
        return await service.images.allow(wanted, who)

    @app.post("/v1/images/retire", dependencies=vault)
    async def retire_image(wanted: RetireImage, who: By) -> Image:
        return await service.images.retire(wanted, who)

    @app.get("/v1/launches", dependencies=vault)
    async def launches(who: By) -> Launches:
        return await service.images.launches(who)

    @app.post("/v1/recovery-key", status_code=201, dependencies=vault)
    async def recovery_key(who: By) -> NewRecoveryKey:
        return await platform.new_recovery_key(who)

    @app.post("/v1/recovery-key/confirm", status_code=204, dependencies=vault)
    async def confirm_recovery_key(given: ConfirmRecoveryKey, who: By) -> None:
        await platform.confirm_recovery_key(given, who)

    @app.post("/v1/recover")
    async def recover(given: RecoveryKeyText, who: By) -> Status:
        await platform.recover(given, who)
        return await service.status(who)

    @app.post("/v1/shutdown")
    async def shutdown(who: By) -> ShutDown:
        done = await service.shut_down(who)
        shut_down()
        return done

    return app


def _error(code: str, message: str, next_step: str = "") -> JSONResponse:
    error = ApiError(code, message, next_step)
    return JSONResponse(error.__dict__, HTTP_STATUS.get(code, 500))
