"""One WebSocket connection: a reader, a worker that carries out commands, a writer, a pump for each session it follows.

A pump is a cursor into the session's log and waits for room in the outbox, so a reader that is slow is slow alone.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect
from uvicorn.protocols.utils import ClientDisconnected

from chatserve.errors import BadRequest, Overloaded, ServiceError, Unauthorized
from chatserve.logs import bind
from chatserve.protocol import events
from chatserve.protocol.codec import Encoding, decode_command, encode
from chatserve.protocol.commands import Command, Hello, Ping
from chatserve.server.closing import CLOSED_ABNORMALLY, CloseCode, ClosingError, PeerGoneError
from chatserve.server.dispatch import Dispatcher, internal_error
from chatserve.server.following import Following
from chatserve.server.outbox import Message, Outbox
from chatserve.server.services import Services
from chatserve.version import __version__

MAX_UNSENT_BYTES = 256 << 10
MAX_WAITING_COMMANDS = 32  # of one connection; then it is read no further
HEARTBEAT_MS = 15_000
_FATAL_CODES = frozenset({"bad_message", "message_too_large"})
logger = logging.getLogger(__name__)


class Connection:
    """A connection whose handshake is done. `run` returns when it has ended; nothing it does ends a turn."""

    def __init__(
        self,
        socket: WebSocket,
        services: Services,
        *,
        encoding: Encoding,
        bearer: str | None,
        send_all: Callable[[Sequence[Message]], Awaitable[None]],
        drop: Callable[[int, str], None],
    ) -> None:
        self.connection_id = "conn_" + secrets.token_hex(8)
        self._socket = socket
        self._services = services
        self._encoding: Encoding = encoding
        self._bearer = bearer
        self._send_all = send_all
        self._drop = drop
        self._timeouts = services.timeouts
        self._tenant: str | None = None
        self._outbox = Outbox(MAX_UNSENT_BYTES)
        self._commands: asyncio.Queue[tuple[Dispatcher, Command]] = asyncio.Queue(MAX_WAITING_COMMANDS)
        self._closing: asyncio.Future[ClosingError] = asyncio.get_running_loop().create_future()
        self._following = Following(
            services.sessions, self._outbox, encoding, services.settings.max_connection_sessions, services.metrics
        )

    @property
    def tenant(self) -> str | None:
        """The tenant, once hello has been accepted."""
        return self._tenant

    def notify(self, event: Mapping[str, Any]) -> None:
        """Queue a connection event at once, whatever else is waiting."""
        if self._tenant is not None:
            self._outbox.put_notice(encode(event, self._encoding))

    def close_soon(self, code: int, reason: str) -> None:
        """Begin to close; what is queued already is sent before, as far as the peer takes it in time."""
        if not self._closing.done():
            self._closing.set_result(ClosingError(CloseCode(code), reason))

    async def run(self) -> None:
        """Serve until either side ends it."""
        bind(connection_id=self.connection_id)
        reader = asyncio.create_task(self._read(), name=f"{self.connection_id}-reader")
        writer = asyncio.create_task(self._write(), name=f"{self.connection_id}-writer")
        worker = asyncio.create_task(self._carry_out(), name=f"{self.connection_id}-worker")
        try:
            with self._services.hub.joined(self):
                ends: set[asyncio.Future[Any]] = {reader, writer, worker, self._closing}
                done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.gather(_end(reader), _end(worker))
                await self._following.close()
                why = _why(done)
                self._services.metrics.note_close(why.code)
                await self._close(why)
        finally:
            self._closing.cancel()
            await asyncio.gather(_end(reader), _end(writer), _end(worker), self._following.close())

    async def _read(self) -> None:
        """Hello, then one command after the other. Always ends in ClosingError or PeerGoneError."""
        try:
            async with asyncio.timeout(self._timeouts.hello_s):
                hello = await self._receive_hello()
        except TimeoutError:
            raise ClosingError(CloseCode.HELLO_TIMEOUT, f"no hello within {self._timeouts.hello_s:g} s") from None
        tenant = self._authenticate(hello)
        try:
            with self._services.hub.admitted(tenant):
                self._tenant = tenant
                await self._converse(tenant, hello)
        except Overloaded as refusal:
            await self._send(events.error(refusal.as_object()))
            raise ClosingError(CloseCode.TOO_MANY_CONNECTIONS, refusal.message) from None
        finally:
            self._tenant = None

    async def _receive_hello(self) -> Hello:
        command = await self._receive()
        if isinstance(command, Hello):
            return command
        refusal = BadRequest("the first command of a connection must be hello", code="bad_message")
        await self._send(events.error(refusal.as_object(), command_id=command.id))
        raise ClosingError(CloseCode.BAD_MESSAGE, refusal.message)

    def _authenticate(self, hello: Hello) -> str:
        try:
            return self._services.access.tenant(hello.token or self._bearer)
        except Unauthorized as refusal:
            self._outbox.put_notice(encode(events.error(refusal.as_object(), command_id=hello.id), self._encoding))
            raise ClosingError(CloseCode.UNAUTHORIZED, refusal.message) from None

    async def _converse(self, tenant: str, hello: Hello) -> None:
        dispatcher = Dispatcher(self._services, self._following, tenant)
        await self._send(self._welcome())
        await self._send_some(self._services.hub.farewell)
        for entry in hello.resume:
            await self._send_some(await dispatcher.resume(entry))
        try:
            while True:
                await self._take(dispatcher, await self._receive())
        except (PeerGoneError, ClosingError):
            await self._commands.join()  # what was said before is carried out
            raise

    async def _take(self, dispatcher: Dispatcher, command: Command) -> None:
        """A ping is answered at once, whatever takes its time; other commands are carried out one after the other."""
        if isinstance(command, Ping):
            await self._send_some(await dispatcher.carry_out(command))
        else:
            await self._commands.put((dispatcher, command))

    async def _carry_out(self) -> None:
        """Carry out what was taken, for ever."""
        while True:
            dispatcher, command = await self._commands.get()
            await self._send_some(await dispatcher.carry_out(command))
            self._commands.task_done()

    async def _receive(self) -> Command:
        """The next well-formed command; a message that is not one is answered here."""
        while True:
            data = await self._next_message()
            try:
                return decode_command(data, self._encoding, max_bytes=self._services.settings.max_message_bytes)
            except ServiceError as refusal:
                command_id = getattr(refusal, "command_id", None)
                await self._send(events.error(refusal.as_object(), command_id=command_id))
                if refusal.code in _FATAL_CODES:
                    raise ClosingError(CloseCode.BAD_MESSAGE, refusal.message) from None

    async def _next_message(self) -> bytes | str:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise PeerGoneError(message.get("code") or CLOSED_ABNORMALLY)
        data: bytes | str | None = message.get("bytes")
        return message["text"] if data is None else data

    async def _send_some(self, event: Mapping[str, Any] | None) -> None:
        if event is not None:
            await self._send(event)

    async def _send(self, event: Mapping[str, Any]) -> None:
        await self._outbox.put(encode(event, self._encoding))

    async def _write(self) -> None:
        """Send what is queued, in order. A peer that takes nothing for `stuck_s` loses its connection."""
        while True:
            messages = await self._outbox.peek()
            try:
                async with asyncio.timeout(self._timeouts.stuck_s):
                    await self._send_all(messages)
            except TimeoutError:
                reason = f"nothing was read for {self._timeouts.stuck_s:g} s"
                raise ClosingError(CloseCode.TRY_AGAIN_LATER, reason) from None
            except ClientDisconnected:
                pass  # the reader hears of it too, and carries out what was said before; its answers reach nobody
            self._outbox.sent(len(messages))

    async def _close(self, why: ClosingError | PeerGoneError) -> None:
        """Send the rest and the close frame to a peer that is there; one that does not take them is cut off."""
        if isinstance(why, PeerGoneError):
            return
        logger.debug("%s closes with %d", self.connection_id, why.code)  # the reason may quote what was sent
        stuck = why.code is CloseCode.TRY_AGAIN_LATER
        try:
            async with asyncio.timeout(0 if stuck else self._timeouts.close_s):
                await self._outbox.wait_empty()
                await self._socket.close(why.code, why.reason)
        except TimeoutError:
            self._drop(why.code, why.reason)
        except (WebSocketDisconnect, RuntimeError):  # the peer was faster
            pass

    def _welcome(self) -> dict[str, Any]:
        settings, info = self._services.settings, self._services.engine.info
        return events.welcome(
            connection_id=self.connection_id,
            server={"name": "chatserve", "version": __version__},
            limits={
                "max_message_bytes": settings.max_message_bytes,
                "max_sessions": settings.max_connection_sessions,
                "max_connections": settings.max_key_connections,
            },
            models=[{"id": info.model, "max_context": info.max_context}],
            heartbeat_ms=HEARTBEAT_MS,
        )


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end, however it ends: `_why` has looked at what mattered."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _why(done: set[asyncio.Future[Any]]) -> ClosingError | PeerGoneError:
    """The reason to close with; where the peer has gone, nobody is left to be told."""
    ends = [future.exception() or future.result() for future in done]
    for kind in (PeerGoneError, ClosingError):
        for end in ends:
            if isinstance(end, kind):
                return end
    logger.error("a connection failed", exc_info=ends[0])
    return ClosingError(CloseCode.INTERNAL_ERROR, internal_error().message)
