"""The HTTP side of sessions: list, create, read, change, delete, resume; and the models. One small endpoint each."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from chatserve.errors import BadRequest, MessageTooLarge
from chatserve.protocol.codec import command_from
from chatserve.protocol.commands import SessionCreate, SessionUpdate
from chatserve.server.access import bearer_key
from chatserve.server.services import Services

MAX_LISTED = 200
DEFAULT_LISTED = 50
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
    """Which page of the list: `before` is the id of the last session seen."""

    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(ge=1, le=MAX_LISTED)] = DEFAULT_LISTED
    before: Annotated[str, Field(min_length=1, max_length=128)] | None = None


def services_of(request: Request) -> Services:
    """The parts that the application was made with."""
    services: Services = request.app.state.services
    return services


def tenant_of(request: Request) -> str:
    """The tenant of the request's key; raises Unauthorized."""
    return services_of(request).access.tenant(bearer_key(request.headers.get("authorization")))


async def list_sessions(request: Request) -> JSONResponse:
    """`GET /v1/sessions?limit=&before=`: newest first."""
    tenant = tenant_of(request)
    query = _validated(ListQuery, dict(request.query_params))
    views = await services_of(request).sessions.list_sessions(tenant, query.limit + 1, query.before)
    page = views[: query.limit]
    return JSONResponse({"object": "list", "data": page, "has_more": len(views) > len(page)})


async def create_session(request: Request) -> JSONResponse:
    """`POST /v1/sessions`: 201, or 200 with the same session where `Idempotency-Key` was used before."""
    tenant, services = tenant_of(request), services_of(request)
    body = await json_body(request)
    key = request.headers.get("idempotency-key") or body.pop("key", None) or secrets.token_hex(16)
    command = command_from({**body, "type": "session.create", "id": "http", "key": key})
    assert isinstance(command, SessionCreate)
    view, duplicate = await services.sessions.create_session(tenant, command)
    if not duplicate:
        services.hub.sessions_changed(tenant)
    return JSONResponse(view, status_code=200 if duplicate else 201)


async def get_session(request: Request) -> JSONResponse:
    """`GET /v1/sessions/{id}`: the session with its messages."""
    tenant = tenant_of(request)
    return JSONResponse(await services_of(request).sessions.get_session(tenant, request.path_params["session_id"]))


async def update_session(request: Request) -> JSONResponse:
    """`PATCH /v1/sessions/{id}`: what is given changes, the rest stays."""
    tenant, services = tenant_of(request), services_of(request)
    body = await json_body(request)
    fields = {"type": "session.update", "id": "http", "session_id": request.path_params["session_id"]}
    command = command_from({**body, **fields})
    assert isinstance(command, SessionUpdate)
    view = await services.sessions.update_session(tenant, command)
    services.hub.sessions_changed(tenant)
    return JSONResponse(view)


async def delete_session(request: Request) -> JSONResponse:
    """`DELETE /v1/sessions/{id}`: gone with everything it held."""
    tenant, services = tenant_of(request), services_of(request)
    session_id = request.path_params["session_id"]
    await services.sessions.delete_session(tenant, session_id)
    services.hub.sessions_changed(tenant)
    return JSONResponse({"id": session_id, "object": "session", "deleted": True})


async def resume_session(request: Request) -> JSONResponse:
    """`POST /v1/sessions/{id}/resume`: what happened since, and how much of the history is still held."""
    tenant = tenant_of(request)
    body = _validated(ResumeBody, await json_body(request))
    session_id = request.path_params["session_id"]
    resumed = await services_of(request).sessions.resume(tenant, session_id, body.epoch, body.after_seq, body.warm)
    return JSONResponse(resumed)


async def session_cache(request: Request) -> JSONResponse:
    """`GET /v1/sessions/{id}/cache`: how many tokens of the session each tier holds."""
    tenant, session_id = tenant_of(request), request.path_params["session_id"]
    return JSONResponse(await services_of(request).sessions.session_cache(tenant, session_id))


async def list_models(request: Request) -> JSONResponse:
    """`GET /v1/models`: the one model that is served."""
    tenant_of(request)
    info = services_of(request).engine.info
    model = {
        "id": info.model,
        "object": "model",
        "created": 0,
        "owned_by": "chatserve",
        "max_context": info.max_context,
        "vocab_size": info.vocab_size,
    }
    return JSONResponse({"object": "list", "data": [model]})


async def json_body(request: Request) -> dict[str, Any]:
    """The body as a map; an empty one is an empty map. Raises MessageTooLarge or BadRequest."""
    raw = await _limited_body(request, services_of(request).settings.max_message_bytes)
    if not raw.strip():
        return {}
    try:
        body = from_json(raw, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}", code="bad_message") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, not {type(body).__name__}", code="bad_message")
    return body


async def _limited_body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise MessageTooLarge(f"the body is larger than {max_bytes} bytes; send less at once")
    return bytes(body)


def _validated(model: type[Body], fields: Mapping[str, Any]) -> Body:
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
    Route("/v1/sessions/{session_id}/resume", resume_session, methods=["POST"]),
    Route("/v1/sessions/{session_id}/cache", session_cache, methods=["GET"]),
    Route("/v1/models", list_models, methods=["GET"]),
]
