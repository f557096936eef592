"""`/v1/responses` in OpenAI's shape: a response is a turn of a session; with `store: false` nothing of it is kept.

A client that goes away ends a response that is not stored, never one that is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from chatserve.errors import BadRequest, ServiceError
from chatserve.server.dispatch import internal_error
from chatserve.server.http import idempotency_key, json_body, services_of, tenant_of
from chatserve.server.openai.fields import Fields, Harmless, refuse_unsupported, validated
from chatserve.server.openai.response_accept import Task, accept, find_response, read_task
from chatserve.server.openai.response_answer import ResponseAnswer
from chatserve.server.openai.response_body import read_response
from chatserve.server.openai.response_events import ResponseEvents
from chatserve.server.openai.response_object import input_item, object_of
from chatserve.server.openai.response_reader import ResponseReader
from chatserve.server.openai.streaming import ClosingStream, respond, unless_gone
from chatserve.server.services import Services
from chatserve.sessions.conversations import StoredResponse

CANCEL_TIMEOUT_S = 10.0
UNSUPPORTED_QUERY: Harmless = {
    "stream": ("false",),
    "include": (),
    "include[]": (),
    "include_obfuscation": ("false",),
    "starting_after": (),
}
AT_FIRST: Mapping[str, Any] = {
    "status": "in_progress",
    "output": [],
    "usage": None,
    "error": None,
    "incomplete_details": None,
}
logger = logging.getLogger(__name__)


class ItemsQuery(Fields):
    """Which of a response's input items: `after` is the id of the last one seen."""

    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: Annotated[str, Field(min_length=1, max_length=64)] | None = None


async def create_response(request: Request) -> Response:
    """`POST /v1/responses`: the object when the response is over, or its events as they come."""
    tenant, services = tenant_of(request), services_of(request)
    wanted = read_response(await json_body(request), model=services.engine.info.model)
    task = await read_task(services.sessions, tenant, wanted, idempotency_key(request))
    if not wanted.store:
        return await _respond_unstored(request, services, task)
    services.hub.check_room(tenant)
    found = await accept(services.sessions, services.hub, task)
    reader = ResponseReader(services.sessions, services.hub, tenant, found)
    if wanted.stream:
        events = _told(reader)
        return ClosingStream(events, events)
    return await unless_gone(request, _when_over(reader))


async def get_response(request: Request) -> Response:
    """`GET /v1/responses/{id}`: the object as it stands."""
    found = await _found(request)
    query = dict(request.query_params)
    refuse_unsupported(query, UNSUPPORTED_QUERY)
    validated(Fields, query, UNSUPPORTED_QUERY, what="a response")
    return JSONResponse(object_of(found))


async def cancel_response(request: Request) -> Response:
    """`POST /v1/responses/{id}/cancel`: end it early; one that is over stays as it is."""
    tenant, services = tenant_of(request), services_of(request)
    reader = ResponseReader(services.sessions, services.hub, tenant, await _found(request))
    await services.sessions.cancel_response(tenant, reader.found.session_id, reader.found.inner_id)
    with contextlib.suppress(TimeoutError):  # then the object says that it is still in progress
        await asyncio.wait_for(reader.wait(), CANCEL_TIMEOUT_S)
    return JSONResponse(object_of(reader.found))


async def list_input_items(request: Request) -> Response:
    """`GET /v1/responses/{id}/input_items`: what the response answers, with all that was said before it."""
    found = await _found(request)
    query = dict(request.query_params)
    refuse_unsupported(query, UNSUPPORTED_QUERY)
    page = validated(ItemsQuery, query, UNSUPPORTED_QUERY, what="a list of input items")
    items = [input_item(message) for message in found.path]
    items = items if page.order == "asc" else items[::-1]
    ids = [item["id"] for item in items]
    if page.after is not None and page.after not in ids:
        raise BadRequest(f"no item {page.after!r} to go on after; list from the start", param="after")
    left = items[ids.index(page.after) + 1 if page.after else 0 :]
    data = left[: page.limit]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return JSONResponse({"object": "list", "data": data, **ends, "has_more": len(left) > len(data)})


async def _found(request: Request) -> StoredResponse:
    tenant = tenant_of(request)
    return await find_response(services_of(request).sessions, tenant, request.path_params["response_id"])


async def _respond_unstored(request: Request, services: Services, task: Task) -> Response:
    """Through the engine without a session."""
    said = [*task.history, *task.wanted.conversation.said]
    conversations = services.sessions.conversations
    prompt_ids = await conversations.prompt(task.tenant, said, instructions=task.instructions, param="input")
    name, wanted = f"resp_{secrets.token_hex(16)}", task.wanted.as_completion
    completion = services.completions.prepare(task.tenant, name, prompt_ids, wanted, param="input")
    answer = ResponseAnswer(completion, services.engine.info.model, task.wanted.asked)
    return await respond(request, services.completions, completion, answer)


async def _when_over(reader: ResponseReader) -> Response:
    return JSONResponse(object_of(await reader.wait()))


async def _told(reader: ResponseReader) -> AsyncGenerator[bytes, None]:
    """The response's events from its beginning to its end."""
    found = reader.found
    events = ResponseEvents(found.reply.id)
    yield events.opening({**object_of(found), **AT_FIRST}) + events.delta(found.reply.text)
    try:
        async with aclosing(reader.deltas()) as deltas:
            async for delta in deltas:
                yield events.delta(delta)
        yield events.ending(object_of(reader.found))
    except ServiceError as error:
        yield events.failure(error)
    except Exception:  # the status is out: all that is left is to say so in the stream
        logger.exception("telling a response failed")
        yield events.failure(internal_error())


ROUTES = [
    Route("/v1/responses", create_response, methods=["POST"]),
    Route("/v1/responses/{response_id}", get_response, methods=["GET"]),
    Route("/v1/responses/{response_id}/cancel", cancel_response, methods=["POST"]),
    Route("/v1/responses/{response_id}/input_items", list_input_items, methods=["GET"]),
]
