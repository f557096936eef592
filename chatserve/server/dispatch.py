"""What each command of protocol `chatserve.v1` does: one handler a command, from the dataclass to the answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from chatserve.errors import BadRequest, ServiceError
from chatserve.logs import bound
from chatserve.protocol import events
from chatserve.protocol.commands import (
    Command,
    Hello,
    Ping,
    ResponseCancel,
    ResponseCreate,
    ResumeEntry,
    SessionAttach,
    SessionCreate,
    SessionDelete,
    SessionDetach,
    SessionFork,
    SessionTyping,
    SessionUpdate,
)
from chatserve.server.following import Following
from chatserve.server.services import Services

Answer = dict[str, Any] | None
logger = logging.getLogger(__name__)


def internal_error() -> ServiceError:
    """What a client is told about a fault of ours; the log has the rest."""
    return ServiceError("the server failed to carry this out; its log says why")


class Dispatcher:
    """Carries out the commands of one connection of one tenant, one at a time."""

    def __init__(self, services: Services, following: Following, tenant: str) -> None:
        self._services = services
        self._sessions = services.sessions
        self._following = following
        self._tenant = tenant
        self._handlers: dict[type, Callable[[Any], Awaitable[Answer]]] = {
            Hello: self._hello,
            SessionCreate: self._create_session,
            SessionAttach: self._attach,
            SessionDetach: self._detach,
            SessionUpdate: self._update_session,
            SessionDelete: self._delete_session,
            SessionFork: self._fork_session,
            ResponseCreate: self._create_response,
            ResponseCancel: self._cancel_response,
            SessionTyping: self._typing,
            Ping: self._ping,
        }

    async def carry_out(self, command: Command) -> Answer:
        """The answer to one command: `ok`, `error` or what its row of the protocol says. Raises nothing."""
        session_id = getattr(command, "session_id", None)
        named = {} if session_id is None else {"session_id": session_id}
        with bound(request_id=command.id, **named):
            return await _answered(self._handlers[type(command)](command), command.id, session_id)

    async def resume(self, entry: ResumeEntry) -> Answer:
        """Follow a session again that `hello` named; only a refusal is left to be sent."""
        attaching = self._following.attach(self._tenant, entry.session_id, epoch=entry.epoch, after_seq=entry.after_seq)
        return await _answered(attaching, None, entry.session_id)

    async def _hello(self, command: Hello) -> Answer:
        raise BadRequest("hello was said already; go on without it", code="invalid_value", param="type")

    async def _create_session(self, command: SessionCreate) -> Answer:
        view, duplicate = await self._sessions.create_session(self._tenant, command)
        if not duplicate:
            self._services.hub.sessions_changed(self._tenant)
        return events.ok(command.id, session=view)

    async def _attach(self, command: SessionAttach) -> Answer:
        await self._following.attach(
            self._tenant,
            command.session_id,
            epoch=command.epoch,
            after_seq=command.after_seq,
            command_id=command.id,
        )
        return None

    async def _detach(self, command: SessionDetach) -> Answer:
        await self._following.detach(command.session_id)
        return events.ok(command.id)

    async def _update_session(self, command: SessionUpdate) -> Answer:
        view = await self._sessions.update_session(self._tenant, command)
        self._services.hub.sessions_changed(self._tenant)
        return events.ok(command.id, session=view)

    async def _delete_session(self, command: SessionDelete) -> Answer:
        await self._sessions.delete_session(self._tenant, command.session_id)
        self._services.hub.sessions_changed(self._tenant)
        return events.ok(command.id)

    async def _fork_session(self, command: SessionFork) -> Answer:
        view, duplicate = await self._sessions.fork_session(self._tenant, command)
        if not duplicate:
            self._services.hub.sessions_changed(self._tenant)
        return events.ok(command.id, session=view)

    async def _create_response(self, command: ResponseCreate) -> Answer:
        accepted = await self._sessions.create_response(self._tenant, command)
        return events.ok(
            command.id,
            message_id=accepted.message_id,
            response_id=accepted.response_id,
            head_seq=accepted.head_seq,
            duplicate=accepted.duplicate,
        )

    async def _cancel_response(self, command: ResponseCancel) -> Answer:
        status = await self._sessions.cancel_response(self._tenant, command.session_id, command.response_id)
        return events.ok(command.id, status=status)

    async def _typing(self, command: SessionTyping) -> Answer:
        await self._sessions.typing(self._tenant, command.session_id)
        return None

    async def _ping(self, command: Ping) -> Answer:
        return events.pong(t=command.t, server_ts=time.time_ns() // 1_000_000)


async def _answered(work: Awaitable[Answer], command_id: str | None, session_id: str | None) -> Answer:
    """What the work answers; a refusal or a fault becomes an `error` event."""
    try:
        return await work
    except ServiceError as refusal:
        error = refusal
    except Exception:  # the connection goes on whatever one command ran into; the client is told
        logger.exception("a command failed")
        error = internal_error()
    return events.error(error.as_object(), command_id=command_id, session_id=session_id)
