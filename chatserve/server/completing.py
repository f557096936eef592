"""Runs completions: prompts without a session, from the engine's tokens to pieces of text. It knows no HTTP.

Nothing of them is stored. The engine is told to forget each at its end; what they share with others stays indexed.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, cast

from chatserve.engine.api import Engine, Finished, FinishReason, GenerationRequest, Progress, Started, Tokens
from chatserve.errors import BadRequest, ServiceError, Unavailable
from chatserve.server.completion_body import Wanted
from chatserve.sessions.reply import Reply
from chatserve.text.pipeline import TextPipeline

RETRY_AFTER_MS = 1000
TOKENS_OF_A_CODE_POINT = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """Text and token ids that arrived together. The last one has a reason, perhaps with text that was held back."""

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"] | None = None


class Completion:
    """One completion. `pieces` may be iterated once; closing it early cancels the request."""

    def __init__(self, wanted: Wanted, request: GenerationRequest, reply: Reply, engine: Engine) -> None:
        self.id = request.request_id
        self.wanted = wanted
        self.prompt_ids = request.token_ids
        self.num_cached = 0
        self._request = request
        self._reply = reply
        self._engine = engine

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self._reply.token_ids)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What is generated, as it comes; the last piece has a reason.

        Raises what `Engine.generate` raises, and Unavailable (`server_draining`) where the server ends it.
        """
        stream = cast(AsyncGenerator[Progress, None], self._engine.generate(self._request))
        try:
            async with aclosing(stream):
                async for progress in stream:
                    piece = self._piece(progress)
                    if piece is not None:
                        yield piece
                    if piece is not None and piece.finish_reason is not None:
                        return
        finally:
            self._engine.forget_session(self._request.session_id)
        raise ServiceError("the engine ended this completion without a reason")

    def _piece(self, progress: Progress) -> Piece | None:
        match progress:
            case Started(cached_tokens):
                self.num_cached = min(sum(cached_tokens.values()), len(self.prompt_ids))
            case Tokens(token_ids):
                text, taken = self._reply.push(token_ids)
                return Piece(text, taken, "stop" if self._reply.is_cut else None)
            case Finished(reason):
                return Piece("" if self._reply.is_over else self._reply.release(), [], _openai_reason(reason))
        return None


class Completions:
    """The completions of one server process."""

    def __init__(self, engine: Engine, text: TextPipeline) -> None:
        self._engine = engine
        self._text = text
        self._running: set[str] = set()
        self._is_open = True
        self._idle = asyncio.Event()

    async def prepare(self, tenant: str, wanted: Wanted) -> Completion:
        """A completion that can start. Raises BadRequest where the prompt leaves no room, Unavailable in a drain."""
        self._check_open()
        given = wanted.prompt
        prompt_ids = await self._text.encode_raw(given) if isinstance(given, str) else list(given)
        eos_token_ids = () if wanted.ignore_eos else self._text.eos_token_ids
        name = f"cmpl-{secrets.token_hex(16)}"
        request = GenerationRequest(
            request_id=name,
            session_id=name,
            tenant=tenant,
            token_ids=prompt_ids,
            num_history=0,
            max_output_tokens=min(wanted.max_tokens, self._room_behind(prompt_ids)),
            sampling=wanted.sampling,
            stop_token_ids=eos_token_ids,
        )
        reply = Reply(self._text.detokenizer(prompt_ids[-TOKENS_OF_A_CODE_POINT:]), wanted.stop, eos_token_ids)
        return Completion(wanted, request, reply, self._engine)

    async def run(self, completion: Completion) -> AsyncGenerator[Piece, None]:
        """The completion's pieces, counted so that `drain` waits for them."""
        self._check_open()
        self._running.add(completion.id)
        try:
            async with aclosing(completion.pieces()) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._running.discard(completion.id)
            if not self._running:
                self._idle.set()

    async def drain(self, timeout_s: float) -> None:
        """Take no more, let the running ones end for `timeout_s`, then end them."""
        self._is_open = False
        if not await self._ended_within(timeout_s):
            for request_id in self._running:
                self._engine.cancel(request_id)

    async def _ended_within(self, timeout_s: float) -> bool:
        self._idle.clear()
        if not self._running:
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def _check_open(self) -> None:
        if not self._is_open:
            raise _draining()

    def _room_behind(self, prompt_ids: list[int]) -> int:
        room = self._engine.info.max_context - len(prompt_ids)
        if not prompt_ids:
            raise BadRequest("the prompt has no tokens", param="prompt")
        if room < 1:
            raise BadRequest(
                f"the prompt has {len(prompt_ids)} tokens and the completion needs at least one, but the context "
                f"holds {self._engine.info.max_context}: shorten the prompt",
                code="context_length_exceeded",
                param="prompt",
            )
        return room


def _openai_reason(reason: FinishReason) -> Literal["stop", "length"]:
    if reason == "cancelled":
        raise _draining()  # nobody else cancels a completion whose pieces are still read
    return "stop" if reason == "stop" else "length"


def _draining() -> Unavailable:
    return Unavailable(
        "the server is shutting down; send this again in a moment",
        code="server_draining",
        retry_after_ms=RETRY_AFTER_MS,
    )
