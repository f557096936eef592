"""`POST /v1/completions`: one prompt without a session, in OpenAI's shape, whole or as server-sent events.

A client that goes away cancels its completion. What fails before the first chunk is an HTTP error, what fails later an
`error` event at the stream's end.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from chatserve.errors import ServiceError
from chatserve.server.completing import Completion, Completions, Piece
from chatserve.server.completion_body import read_body
from chatserve.server.dispatch import internal_error
from chatserve.server.http import json_body, services_of, tenant_of

CLIENT_CLOSED_REQUEST = 499  # nginx's word for it: nobody reads the answer, but logs of proxies know it
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
T = TypeVar("T")
logger = logging.getLogger(__name__)


async def create_completion(request: Request) -> Response:
    """The completion, or its stream once the first piece is there."""
    tenant, services = tenant_of(request), services_of(request)
    info = services.engine.info
    wanted = read_body(await json_body(request), model=info.model, vocab_size=info.vocab_size)
    completion = await services.completions.prepare(tenant, wanted)
    answer = Answer(completion, info.model)
    try:
        if wanted.stream:
            return await _unless_gone(request, _stream(services.completions, answer))
        return JSONResponse(await _unless_gone(request, _whole(services.completions, answer)))
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


class ClientGone(Exception):
    """The client closed the connection before there was an answer."""


class Answer:
    """The objects that a completion is told in, for both ways of telling."""

    def __init__(self, completion: Completion, model: str) -> None:
        self.completion = completion
        self._wanted = completion.wanted
        self._frame = {
            "id": completion.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._head = to_json(self._frame)[:-1] + b',"choices":[{"index":0,"text":'
        self._tail = b'}],"usage":null}\n\n' if self._wanted.include_usage else b"}]}\n\n"

    def whole(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """The body of an answer that is no stream."""
        collected = list(pieces)
        choice: dict[str, Any] = {
            "index": 0,
            "text": "".join(piece.text for piece in collected),
            "logprobs": None,
            "finish_reason": collected[-1].finish_reason,
        }
        if self._wanted.return_token_ids:
            choice["prompt_token_ids"] = self.completion.prompt_ids
            choice["token_ids"] = [token_id for piece in collected for token_id in piece.token_ids]
        return {**self._frame, "choices": [choice], "usage": self._usage()}

    def chunk(self, piece: Piece, *, is_first: bool) -> bytes:
        """One event of a stream; spelled out, because it is written for every token."""
        reason = f'"{piece.finish_reason}"' if piece.finish_reason else "null"
        ids = ""
        if self._wanted.return_token_ids:
            ids = f',"token_ids":{json.dumps(piece.token_ids)}'
        if self._wanted.return_token_ids and is_first:
            ids += f',"prompt_token_ids":{json.dumps(self.completion.prompt_ids)}'
        fields = f',"logprobs":null,"finish_reason":{reason}{ids}'
        return b"data: " + self._head + to_json(piece.text) + fields.encode() + self._tail

    def ending(self) -> bytes:
        """The usage, where it was asked for, and the last event."""
        if not self._wanted.include_usage:
            return b"data: [DONE]\n\n"
        return event({**self._frame, "choices": [], "usage": self._usage()}) + b"data: [DONE]\n\n"

    def _usage(self) -> dict[str, Any]:
        num_prompt, num_generated = len(self.completion.prompt_ids), self.completion.num_generated
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": self.completion.num_cached},
        }


def event(fields: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(fields) + b"\n\n"


async def _whole(completions: Completions, answer: Answer) -> dict[str, Any]:
    async with aclosing(completions.run(answer.completion)) as pieces:
        return answer.whole([piece async for piece in pieces])


async def _stream(completions: Completions, answer: Answer) -> StreamingResponse:
    """The response, once its first piece is there: until then a refusal is an HTTP error."""
    pieces = completions.run(answer.completion)
    try:
        first = await anext(pieces)
    except BaseException:  # a cancelled start must not leave the engine generating either; raised again
        await pieces.aclose()
        raise
    return ClosingStream(pieces, _chunks(answer, first, pieces))


class ClosingStream(StreamingResponse):
    """A stream whose source is closed with it, also where nothing was read from it."""

    def __init__(self, pieces: AsyncGenerator[Piece, None], chunks: AsyncGenerator[bytes, None]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers=STREAM_HEADERS)
        self._pieces = pieces

    async def __call__(self, *asgi: Any) -> None:
        """ASGI entry."""
        async with aclosing(self._pieces):
            await super().__call__(*asgi)


async def _chunks(answer: Answer, first: Piece, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[bytes, None]:
    yield answer.chunk(first, is_first=True)
    try:
        async for piece in pieces:
            yield answer.chunk(piece, is_first=False)
    except ServiceError as error:
        yield event({"error": error.as_object()})
        return
    except Exception:  # the status is out: all that is left is to say so in the stream
        logger.exception("a completion failed")
        yield event({"error": internal_error().as_object()})
        return
    yield answer.ending()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result. Raises ClientGone, with the work cancelled, where the client goes away first."""
    working = asyncio.create_task(work)
    listening = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return await working
    finally:
        working.cancel()
        listening.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


ROUTES = [Route("/v1/completions", create_completion, methods=["POST"])]
