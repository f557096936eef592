"""`POST /v1/chat/completions`: the reply to a conversation that is sent whole, in OpenAI's shape.

Nothing of it is stored. Where it goes on from a stored session of the tenant, that session's tokens are its beginning.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chatserve.errors import ServiceError
from chatserve.server.http import json_body, services_of, tenant_of
from chatserve.server.openai.chat_body import read_chat
from chatserve.server.openai.completing import Completion, Piece
from chatserve.server.openai.streaming import event, respond


async def create_chat_completion(request: Request) -> Response:
    """The reply, or its stream once the first piece is there."""
    tenant, services = tenant_of(request), services_of(request)
    model = services.engine.info.model
    conversation, wanted = read_chat(await json_body(request), model=model)
    prompt_ids = await services.sessions.conversations.prompt(
        tenant, conversation.said, instructions=conversation.instructions
    )
    name = f"chatcmpl-{secrets.token_hex(16)}"
    completion = services.completions.prepare(tenant, name, prompt_ids, wanted, param="messages")
    return await respond(request, services.completions, completion, ChatAnswer(completion, model))


class ChatAnswer:
    """The objects that a chat completion is told in; see `streaming.Answer`. Token ids stand where vLLM puts them."""

    def __init__(self, completion: Completion, model: str) -> None:
        self.completion = completion
        self._wanted = completion.wanted
        self._model = model
        self._created = int(time.time())

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The body of an answer that is no stream."""
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": pieces[-1].finish_reason}
        body = {**self._frame("chat.completion"), "choices": [choice], "usage": self.completion.usage}
        if self._wanted.return_token_ids:
            choice["token_ids"] = [token_id for piece in pieces for token_id in piece.token_ids]
            body["prompt_token_ids"] = self.completion.prompt_ids
        return body

    def chunk(self, piece: Piece, *, is_first: bool) -> bytes:
        """Who speaks, the text, why it ended: an event each, as far as they are there."""
        events = b""
        if is_first:
            events += self._event({"role": "assistant", "content": "", "refusal": None}, is_first=True)
        if piece.text or (piece.token_ids and self._wanted.return_token_ids):
            events += self._event({"content": piece.text}, token_ids=piece.token_ids)
        if piece.finish_reason:
            events += self._event({}, finish_reason=piece.finish_reason)
        return events

    def ending(self) -> bytes:
        """The usage, where it was asked for, and the last event."""
        usage = event({**self._frame(), "choices": [], "usage": self.completion.usage})
        return (usage if self._wanted.include_usage else b"") + b"data: [DONE]\n\n"

    def failure(self, error: ServiceError) -> bytes:
        """The error; the stream ends without its last event."""
        return event({"error": error.as_object()})

    def _event(
        self,
        delta: dict[str, Any],
        *,
        finish_reason: str | None = None,
        token_ids: Sequence[int] = (),
        is_first: bool = False,
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = {**self._frame(), "choices": [choice]}
        if self._wanted.include_usage:
            chunk["usage"] = None
        if self._wanted.return_token_ids:
            choice["token_ids"] = token_ids
        if self._wanted.return_token_ids and is_first:
            chunk["prompt_token_ids"] = self.completion.prompt_ids
        return event(chunk)

    def _frame(self, kind: str = "chat.completion.chunk") -> dict[str, Any]:
        return {"id": self.completion.id, "object": kind, "created": self._created, "model": self._model}


ROUTES = [Route("/v1/chat/completions", create_chat_completion, methods=["POST"])]
