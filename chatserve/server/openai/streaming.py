"""How answers of this surface go out: whole, or as server-sent events, and what a client that goes away ends.

A client that goes away cancels its completion. What fails before the first event is an HTTP error, what fails later is
told in the stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from chatserve.errors import ServiceError
from chatserve.server.dispatch import internal_error
from chatserve.server.openai.completing import Completion, Completions, Piece
from chatserve.server.replies import CLIENT_CLOSED_REQUEST

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
T = TypeVar("T")
logger = logging.getLogger(__name__)


class Answer(Protocol):
    """The objects that one completion is told in, for both ways of telling."""

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The body of an answer that is no stream."""
        ...

    def chunk(self, piece: Piece, *, is_first: bool) -> bytes:
        """The events of a stream for one piece."""
        ...

    def ending(self) -> bytes:
        """The events behind the last piece."""
        ...

    def failure(self, error: ServiceError) -> bytes:
        """The events in place of everything that would have followed."""
        ...


class ClientGone(Exception):
    """The client closed the connection before there was an answer."""


class ClosingStream(StreamingResponse):
    """A stream whose source is closed with it, also where nothing was read from it."""

    def __init__(self, source: AsyncGenerator[Any, None], chunks: AsyncGenerator[bytes, None]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers=STREAM_HEADERS)
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        async with aclosing(self._source):
            await super().__call__(scope, receive, send)


def event(fields: Mapping[str, Any]) -> bytes:
    """One server-sent event without a name."""
    return b"data: " + to_json(fields) + b"\n\n"


async def respond(request: Request, completions: Completions, completion: Completion, answer: Answer) -> Response:
    """The completion, or its stream once the first piece is there."""
    pieces = completions.run(completion)
    if completion.wanted.stream:
        return await unless_gone(request, _stream(pieces, answer))
    return await unless_gone(request, _whole(pieces, answer))


async def unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """What the work answers; where the client goes away first, the work is cancelled."""
    try:
        return await _before_end(request, work)
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _whole(pieces: AsyncGenerator[Piece, None], answer: Answer) -> Response:
    async with aclosing(pieces):
        return JSONResponse(answer.whole([piece async for piece in pieces]))


async def _stream(pieces: AsyncGenerator[Piece, None], answer: Answer) -> Response:
    """The response, once its first piece is there: until then a refusal is an HTTP error."""
    try:
        first = await anext(pieces)
    except BaseException:  # a cancelled start must not leave the engine generating either; raised again
        await pieces.aclose()
        raise
    return ClosingStream(pieces, _chunks(answer, first, pieces))


async def _chunks(answer: Answer, first: Piece, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[bytes, None]:
    yield answer.chunk(first, is_first=True)
    try:
        async for piece in pieces:
            yield answer.chunk(piece, is_first=False)
    except ServiceError as error:
        yield answer.failure(error)
        return
    except Exception:  # the status is out: all that is left is to say so in the stream
        logger.exception("a completion failed")
        yield answer.failure(internal_error())
        return
    yield answer.ending()


async def _before_end(request: Request, work: Coroutine[Any, Any, T]) -> T:
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
