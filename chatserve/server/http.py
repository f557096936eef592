"""The HTTP side of sessions: list, create, fork, read, change, delete, resume. Small endpoints."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from chatserve.errors import BadRequest, MessageTooLarge, NotFound, TooSlow
from chatserve.protocol.codec import command_from
from chatserve.protocol.commands import SessionCreate, SessionFork, SessionUpdate
from chatserve.server.access import bearer_key
from chatserve.server.services import Services

MAX_LISTED = 200
DEFAULT_LISTED = 50
MAX_ID_CHARS = 64
BODY_GRACE_S = 30.0  # a body may take this long, and as long again as its size takes at the rate below
MIN_BODY_BYTES_S = 64 << 10
Body = TypeVar("Body", bound=BaseModel)
Cursor = Annotated[int, Field(ge=0, le=(1 << 53) - 1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ResumeBody(_Strict):
    """What the client saw last, and whether it is about to go on."""

    epoch: Cursor | None = None
    after_seq: Cursor | None = None
    warm: bool = False


class ListQuery(BaseModel):
    """Which page of the list: `before` is the id of the last session seen; `search` has words that were said."""

    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(ge=1, le=MAX_LISTED)] = DEFAULT_LISTED
    before: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    search: Annotated[str, Field(max_length=200)] = ""


def services_of(request: Request) -> Services:
    """The parts that the application was made with."""
    services: Services = request.app.state.services
    return services


def tenant_of(request: Request) -> str:
    """The tenant of the request's key; raises Unauthorized."""
    return services_of(request).access.tenant(bearer_key(request.headers.get("authorization")))


def session_id_of(request: Request) -> str:
    """The session named in the path; raises NotFound where it cannot be one."""
    session_id: str = request.path_params["session_id"]
    if len(session_id) > MAX_ID_CHARS:
        raise NotFound(f"there is no session {session_id[:MAX_ID_CHARS]!r}…", param="session_id")
    return session_id


def idempotency_key(request: Request) -> str | None:
    """The header `Idempotency-Key`; raises BadRequest for one that is too long."""
    key = request.headers.get("idempotency-key") or None
    if key is not None and len(key) > MAX_ID_CHARS:
        raise BadRequest(f"Idempotency-Key has {len(key)} characters; send at most {MAX_ID_CHARS}", param="key")
    return key


def key_of(request: Request, body: dict[str, Any]) -> str:
    """The key that makes a command harmless to repeat: from the header or, taken out, the body; else a new one."""
    given = body.pop("key", None)
    return idempotency_key(request) or given or secrets.token_hex(16)


async def list_sessions(request: Request) -> JSONResponse:
    """`GET /v1/sessions?limit=&before=&search=`: newest first, with `search` those that have all of its words."""
    tenant, services = tenant_of(request), services_of(request)
    query = validated(ListQuery, dict(request.query_params))
    words = query.search.split()
    with services.searches.taken(tenant) if words else nullcontext():
        views = await services.sessions.list_sessions(tenant, query.limit + 1, query.before, words)
    page = views[: query.limit]
    return JSONResponse({"object": "list", "data": page, "has_more": len(views) > len(page)})


async def create_session(request: Request) -> JSONResponse:
    """`POST /v1/sessions`: 201, or 200 with the same session where `Idempotency-Key` was used before."""
    tenant, services = tenant_of(request), services_of(request)
    body = await json_body(request)
    command = command_from({**body, "key": key_of(request, body), "type": "session.create", "id": "http"})
    assert isinstance(command, SessionCreate)
    view, duplicate = await services.sessions.create_session(tenant, command)
    if not duplicate:
        services.hub.sessions_changed(tenant)
    return JSONResponse(view, status_code=200 if duplicate else 201)


async def get_session(request: Request) -> JSONResponse:
    """`GET /v1/sessions/{id}`: the session with its messages."""
    tenant = tenant_of(request)
    return JSONResponse(await services_of(request).sessions.get_session(tenant, session_id_of(request)))


async def fork_session(request: Request) -> JSONResponse:
    """`POST /v1/sessions/{id}/fork`: a session that begins as this one does. 201, or 200 where its key was used."""
    tenant, services = tenant_of(request), services_of(request)
    body = await json_body(request)
    fields = {"type": "session.fork", "id": "http", "session_id": session_id_of(request)}
    command = command_from({**body, "key": key_of(request, body), **fields})
    assert isinstance(command, SessionFork)
    view, duplicate = await services.sessions.fork_session(tenant, command)
    if not duplicate:
        services.hub.sessions_changed(tenant)
    return JSONResponse(view, status_code=200 if duplicate else 201)


async def update_session(request: Request) -> JSONResponse:
    """`PATCH /v1/sessions/{id}`: what is given changes, the rest stays."""
    tenant, services = tenant_of(request), services_of(request)
    body = await json_body(request)
    fields = {"type": "session.update", "id": "http", "session_id": session_id_of(request)}
    command = command_from({**body, **fields})
    assert isinstance(command, SessionUpdate)
    view = await services.sessions.update_session(tenant, command)
    services.hub.sessions_changed(tenant)
    return JSONResponse(view)


async def delete_session(request: Request) -> JSONResponse:
    """`DELETE /v1/sessions/{id}`: gone with everything it held."""
    tenant, services = tenant_of(request), services_of(request)
    session_id = session_id_of(request)
    await services.sessions.delete_session(tenant, session_id)
    services.hub.sessions_changed(tenant)
    return JSONResponse({"id": session_id, "object": "session", "deleted": True})


async def resume_session(request: Request) -> JSONResponse:
    """`POST /v1/sessions/{id}/resume`: what happened since, and how much of the history is still held."""
    tenant = tenant_of(request)
    body = validated(ResumeBody, await json_body(request))
    session_id = session_id_of(request)
    services = services_of(request)
    resumed = await services.sessions.resume(tenant, session_id, body.epoch, body.after_seq, body.warm)
    if body.after_seq:
        services.metrics.note_resume(resumed["mode"])
    if body.after_seq and resumed.get("events"):
        services.metrics.note_missed(resumed["events"][0]["ts"])
    return JSONResponse(resumed)


async def session_cache(request: Request) -> JSONResponse:
    """`GET /v1/sessions/{id}/cache`: how many tokens of the session each tier holds."""
    tenant, session_id = tenant_of(request), session_id_of(request)
    return JSONResponse(await services_of(request).sessions.session_cache(tenant, session_id))


async def json_body(request: Request) -> dict[str, Any]:
    """The body as a map; an empty one is an empty map. Raises MessageTooLarge or BadRequest."""
    raw = await limited_body(request, services_of(request).settings.max_message_bytes)
    if not raw.strip():
        return {}
    try:
        body = from_json(raw, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}", code="bad_message") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, not {type(body).__name__}", code="bad_message")
    return body


async def limited_body(request: Request, max_bytes: int) -> bytes:
    """The body. Raises MessageTooLarge past `max_bytes`, TooSlow where it would hold its connection for long."""
    timeout_s = BODY_GRACE_S + max_bytes / MIN_BODY_BYTES_S
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_body(request, max_bytes)
    except TimeoutError:
        raise TooSlow(f"the body did not arrive within {timeout_s:.0f} s; send it faster, or less") from None


async def _read_body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise MessageTooLarge(f"the body is larger than {max_bytes} bytes; send less at once")
    return bytes(body)


def validated(model: type[Body], fields: Mapping[str, Any]) -> Body:
    """Query or body as a model; raises BadRequest that names the field at fault."""
    try:
        return model(**fields)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        param = ".".join(str(step) for step in fault["loc"])
        raise BadRequest(f"{param}: {fault['msg']}", param=param) from None


ROUTES = [
    Route("/v1/sessions", list_sessions, methods=["GET"]),
    Route("/v1/sessions", create_session, methods=["POST"]),
    Route("/v1/sessions/{session_id}", get_session, methods=["GET"]),
    Route("/v1/sessions/{session_id}", update_session, methods=["PATCH"]),
    Route("/v1/sessions/{session_id}", delete_session, methods=["DELETE"]),
    Route("/v1/sessions/{session_id}/fork", fork_session, methods=["POST"]),
    Route("/v1/sessions/{session_id}/resume", resume_session, methods=["POST"]),
    Route("/v1/sessions/{session_id}/cache", session_cache, methods=["GET"]),
]
