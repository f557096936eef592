"""Turns and events over HTTP, for those who have no WebSocket: send and wait or stream, cancel, follow.

A turn runs whether or not its sender stays: whoever was cut off sends it again under the same key, and gets the same
response.
"""

from __future__ import annotations

from dataclasses import asdict

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from chatserve.errors import BadRequest, NotFound
from chatserve.protocol import events
from chatserve.protocol.codec import command_from
from chatserve.protocol.commands import ResponseCreate
from chatserve.server.event_stream import EventStreamResponse, SessionStream, frame, read_event_id
from chatserve.server.http import (
    MAX_ID_CHARS,
    Cursor,
    json_body,
    key_of,
    services_of,
    session_id_of,
    tenant_of,
    validated,
)
from chatserve.server.openai.streaming import unless_gone
from chatserve.server.services import Services
from chatserve.server.turn_end import TurnEnd
from chatserve.sessions.accept import Accepted
from chatserve.sessions.manager import Attached


class EventsQuery(BaseModel):
    """The last event seen, for clients that cannot send `Last-Event-ID`."""

    model_config = ConfigDict(extra="forbid")

    epoch: Cursor | None = None
    after_seq: Cursor | None = None


async def session_events(request: Request) -> Response:
    """`GET /v1/sessions/{id}/events`: what follows the cursor, then what comes.

    The cursor is `Last-Event-ID`, else `epoch` and `after_seq` of the query; without one, or where the log has no
    longer what follows it, a snapshot comes first.
    """
    tenant, session_id, services = tenant_of(request), session_id_of(request), services_of(request)
    cursor = validated(EventsQuery, dict(request.query_params))
    epoch, after_seq = cursor.epoch, cursor.after_seq
    if last_event_id := request.headers.get("last-event-id"):
        epoch, after_seq = read_event_id(last_event_id)
    services.hub.check_room(tenant)
    attached = await services.sessions.attach(tenant, session_id, epoch, after_seq)
    if after_seq:
        services.metrics.note_resume(attached.mode)
    if after_seq:  # else it has seen nothing yet
        services.metrics.note_resume(attached.mode)
    stream = SessionStream(
        services,
        tenant,
        session_id,
        epoch=attached.epoch,
        after_seq=attached.after_seq,
        opening=[_announcement(attached)],
    )
    return EventStreamResponse(stream, services)


def _announcement(attached: Attached) -> bytes:
    """What the stream begins with; a snapshot moves the client's cursor to where it stands."""
    event = events.session_attached(
        session_id=attached.session_id,
        epoch=attached.epoch,
        head_seq=attached.head_seq,
        mode=attached.mode,
        snapshot=attached.snapshot,
    )
    return frame(event, f"{attached.epoch}:{attached.head_seq}" if attached.snapshot is not None else None)


async def create_response(request: Request) -> Response:
    """`POST /v1/sessions/{id}/responses`: one turn; its end as JSON, or with `stream` its events as they come."""
    tenant, session_id, services = tenant_of(request), session_id_of(request), services_of(request)
    command, is_stream = await _turn_of(request, session_id)
    services.hub.check_room(tenant)
    accepted = await services.sessions.create_response(tenant, command)
    epoch = (await services.sessions.attach(tenant, session_id, None, None)).epoch
    end = TurnEnd(services, tenant, session_id, accepted, epoch)
    if is_stream:
        return EventStreamResponse(await _stream(services, tenant, session_id, accepted, epoch, end), services)
    return await unless_gone(request, _whole(accepted, end))


async def _whole(accepted: Accepted, end: TurnEnd) -> Response:
    return JSONResponse({**asdict(accepted), "response": await end.response()})


async def _turn_of(request: Request, session_id: str) -> tuple[ResponseCreate, bool]:
    """The turn that is asked for, and whether as a stream."""
    body = await json_body(request)
    is_stream = body.pop("stream", False)
    if not isinstance(is_stream, bool):
        raise BadRequest(f"stream is {str(is_stream)[:48]!r}; send true or false", param="stream")
    fields = {"type": "response.create", "id": "http", "session_id": session_id}
    command = command_from({**body, "key": key_of(request, body), **fields})
    assert isinstance(command, ResponseCreate)
    return command, is_stream


async def _stream(
    services: Services, tenant: str, session_id: str, accepted: Accepted, epoch: int, end: TurnEnd
) -> SessionStream:
    """The turn's events from its first to its last; of one that ended long ago, the last alone."""
    first_seq = accepted.head_seq - (accepted.message_id is not None)
    stored = await end.stored() if accepted.duplicate else None
    return SessionStream(
        services,
        tenant,
        session_id,
        epoch=epoch,
        after_seq=None if stored else first_seq - 1,
        opening=[frame({"type": f"response.{stored['status']}", "response": stored})] if stored else [],
        response_id=accepted.response_id,
    )


async def cancel_response(request: Request) -> JSONResponse:
    """`POST /v1/sessions/{id}/responses/{rid}/cancel`: end it early; harmless to repeat."""
    tenant, session_id = tenant_of(request), session_id_of(request)
    response_id: str = request.path_params["response_id"]
    if len(response_id) > MAX_ID_CHARS:
        raise NotFound(f"there is no response {response_id[:MAX_ID_CHARS]!r}…", code="response_not_found")
    status = await services_of(request).sessions.cancel_response(tenant, session_id, response_id)
    return JSONResponse({"response_id": response_id, "status": status})


ROUTES = [
    Route("/v1/sessions/{session_id}/events", session_events, methods=["GET"]),
    Route("/v1/sessions/{session_id}/responses", create_response, methods=["POST"]),
    Route("/v1/sessions/{session_id}/responses/{response_id}/cancel", cancel_response, methods=["POST"]),
]
