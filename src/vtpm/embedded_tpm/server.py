"""Serves one engine on the two sockets that the TCTI `swtpm:path=` expects. For the embedded TPM alone.

Commands run one after another in one thread; the event loop stays free, so that a long command can be cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vtpm.engine.engine import Engine
from vtpm.errors import EngineError, ProtocolError, StoreError
from vtpm.tpm.headers import MAX_COMMAND_BYTES
from vtpm.tpm.return_codes import Rc12
from vtpm.wire.emulator import (
    Capability,
    Command,
    ControlDecoder,
    Malformed,
    Plain,
    Request,
    SetLocality,
    encode_reply,
    error_reply,
)
from vtpm.wire.tpm_stream import BadCommand, CommandFramer, TpmCommand, frame_response

MAX_CLIENTS = 16
_READ_BYTES = 8192
_log = logging.getLogger(__name__)

_Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


class EmbeddedServer:
    """Serves until `failed` is done or it is closed.

    Args:
        engine: powered on; its store makes state durable before it returns.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pool = ThreadPoolExecutor(1, "engine")
        self._servers: list[asyncio.Server] = []
        self._clients: set[asyncio.Task[None]] = set()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done, with the error, when the engine or its store has failed: nothing may be answered any more."""

    async def serve(self, data_listener: socket.socket, control_listener: socket.socket) -> None:
        """Take connections from now on; the listeners become the server's."""
        for listener, serve in ((data_listener, self._serve_data), (control_listener, self._serve_control)):
            self._servers.append(await asyncio.start_unix_server(self._guarded(serve), sock=listener))

    async def close(self) -> None:
        """Take no more connections, let the command that runs come to its end, drop all clients."""
        for server in self._servers:
            server.close()
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        await asyncio.to_thread(self._pool.shutdown)

    def _guarded(self, serve: _Serve) -> _Serve:
        """Wrap a connection's handler: bounded in number, errors of the peer logged."""

        async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None  # noqa: S101 - start_unix_server makes one
            if len(self._clients) >= MAX_CLIENTS:
                _log.warning("refused a client: there are %d", MAX_CLIENTS)
                writer.close()
                return
            self._clients.add(task)
            try:
                await serve(reader, writer)
            except (OSError, ProtocolError) as error:
                _log.info("dropped a client: %s", error)
            except asyncio.CancelledError:
                pass  # `close` ends it
            finally:
                self._clients.discard(task)
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

        return run

    async def _serve_data(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        framer = CommandFramer(MAX_COMMAND_BYTES)
        while data := await reader.read(_READ_BYTES):
            for item in framer.feed(data):
                if isinstance(item, BadCommand):
                    raise ProtocolError(item.message)
                response = await self._process(item)
                if response is None:
                    return
                writer.write(frame_response(response, prefixed=item.prefixed))
                await writer.drain()

    async def _process(self, command: TpmCommand) -> bytes | None:
        """Run a command; None when the engine has failed, so that there is no answer."""
        if command.locality:
            raise ProtocolError(f"locality {command.locality} is not for clients of the embedded TPM; 0 is")
        if self.failed.done():
            return None
        try:
            response = await asyncio.get_running_loop().run_in_executor(self._pool, self._engine.process, command.data)
        except EngineError as error:
            self._fail(error)
            return None
        if self._engine.store_error is not None:
            # The command was run but is not durable, so it must not be answered.
            self._fail(StoreError(f"the embedded TPM's state is not durable: {self._engine.store_error}"))
            return None
        return response

    def _fail(self, error: EngineError | StoreError) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)

    async def _serve_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = ControlDecoder()
        while data := await reader.read(_READ_BYTES):
            for request in decoder.feed(data):
                if isinstance(request, Malformed):
                    writer.write(request.reply)
                    if not request.in_step:
                        raise ProtocolError(request.message)
                else:
                    writer.write(self._control(request))
                await writer.drain()

    def _control(self, request: Request) -> bytes:
        match request:
            case Plain(command=Command.GET_CAPABILITY):
                known = Capability.SET_LOCALITY | Capability.CANCEL_TPM_CMD
                return encode_reply(Command.GET_CAPABILITY, capabilities=int(known))
            case Plain(command=Command.CANCEL_TPM_CMD):
                self._engine.cancel()
                return encode_reply(Command.CANCEL_TPM_CMD)
            case SetLocality(locality=0):
                return encode_reply(Command.SET_LOCALITY)
            case SetLocality():
                return error_reply(Command.SET_LOCALITY, Rc12.TPM_BAD_LOCALITY)
        return error_reply(request.command, Rc12.TPM_BAD_ORDINAL)
