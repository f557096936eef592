"""`POST /v1/completions`: one prompt without a session, in OpenAI's shape, whole or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chatserve.errors import ServiceError
from chatserve.server.http import json_body, services_of, tenant_of
from chatserve.server.openai.completing import Completion, Piece
from chatserve.server.openai.completion_body import read_body
from chatserve.server.openai.streaming import event, respond


async def create_completion(request: Request) -> Response:
    """The completion, or its stream once the first piece is there."""
    tenant, services = tenant_of(request), services_of(request)
    info = services.engine.info
    prompt, wanted = read_body(await json_body(request), model=info.model, vocab_size=info.vocab_size)
    name = f"cmpl-{secrets.token_hex(16)}"
    completion = await services.completions.prepare_raw(tenant, name, prompt, wanted)
    return await respond(request, services.completions, completion, CompletionAnswer(completion, info.model))


class CompletionAnswer:
    """The objects that a completion is told in; see `streaming.Answer`."""

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

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The body of an answer that is no stream."""
        choice: dict[str, Any] = {
            "index": 0,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": None,
            "finish_reason": pieces[-1].finish_reason,
        }
        if self._wanted.return_token_ids:
            choice["prompt_token_ids"] = self.completion.prompt_ids
            choice["token_ids"] = [token_id for piece in pieces for token_id in piece.token_ids]
        return {**self._frame, "choices": [choice], "usage": self.completion.usage}

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
        return event({**self._frame, "choices": [], "usage": self.completion.usage}) + b"data: [DONE]\n\n"

    def failure(self, error: ServiceError) -> bytes:
        """The error; the stream ends without its last event."""
        return event({"error": error.as_object()})


ROUTES = [Route("/v1/completions", create_completion, methods=["POST"])]
