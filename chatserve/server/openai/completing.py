"""Runs completions of every kind: prompts without a session, from the engine's tokens to pieces of text. No HTTP.

Nothing of them is stored. The engine is told to forget each at its end; what they share with others stays indexed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, cast

from chatserve.engine.api import Engine, Finished, FinishReason, GenerationRequest, Progress, Started, Tokens
from chatserve.errors import BadRequest, ServiceError, Unavailable
from chatserve.server.openai.fields import Wanted
from chatserve.sessions.accounting import Account
from chatserve.sessions.ending import Status
from chatserve.sessions.reply import Reply
from chatserve.text.pipeline import TextPipeline

RETRY_AFTER_MS = 1000
TOKENS_OF_A_CODE_POINT = 4
FinishedBy = Literal["stop", "length"]
OnResponse = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """Text and token ids that arrived together. The last one has a reason, perhaps with text that was held back."""

    text: str
    token_ids: list[int]
    finish_reason: FinishedBy | None = None


class Completion:
    """One completion. `pieces` may be iterated once; closing it early cancels the request.

    `on_response` is told of its end, if it began: status, usage and timings, as of a session's response.
    """

    def __init__(
        self, wanted: Wanted, request: GenerationRequest, reply: Reply, engine: Engine, on_response: OnResponse
    ) -> None:
        self.id = request.request_id
        self.wanted = wanted
        self.prompt_ids = request.token_ids
        self._request = request
        self._reply = reply
        self._engine = engine
        self._on_response = on_response
        self._account = Account(num_input=len(request.token_ids), num_history=0, planned_reason=None)
        self._status: Status = "cancelled"

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self._reply.token_ids)

    @property
    def num_cached(self) -> int:
        """Tokens of the prompt that needed no work, once prefill is done."""
        return self._account.usage(0)["input_tokens_details"]["cached_tokens"]

    @property
    def usage(self) -> dict[str, Any]:
        """What it cost, as completions of both kinds tell it."""
        return {
            "prompt_tokens": len(self.prompt_ids),
            "completion_tokens": self.num_generated,
            "total_tokens": len(self.prompt_ids) + self.num_generated,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        }

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What is generated, as it comes; the last piece has a reason.

        Raises what `Engine.generate` raises, and Unavailable (`server_draining`) where the server ends it.
        """
        try:
            async with aclosing(self._generated()) as pieces:
                async for piece in pieces:
                    if piece.finish_reason is not None:
                        self._status = "completed" if piece.finish_reason == "stop" else "incomplete"
                    yield piece
        except ServiceError:
            self._status = "failed"
            raise
        finally:
            self._engine.forget_session(self._request.session_id)
            self._tell_end()

    async def _generated(self) -> AsyncGenerator[Piece, None]:
        stream = cast(AsyncGenerator[Progress, None], self._engine.generate(self._request))
        async with aclosing(stream):
            async for progress in stream:
                piece = self._piece(progress)
                if piece is not None:
                    yield piece
                if piece is not None and piece.finish_reason is not None:
                    return
        raise ServiceError("the engine ended this completion without a reason")

    def _tell_end(self) -> None:
        if self._account.cache is not None:
            usage, timings = self._account.usage(self.num_generated), self._account.timings(self.num_generated)
            self._on_response({"id": self.id, "status": self._status, "usage": usage, "timings": timings})

    def _piece(self, progress: Progress) -> Piece | None:
        match progress:
            case Started():
                self._account.start(progress)
            case Tokens(token_ids):
                self._account.note_tokens()
                text, taken = self._reply.push(token_ids)
                return Piece(text, taken, "stop" if self._reply.is_cut else None)
            case Finished(reason, decode_ms):
                self._account.finish(decode_ms)
                return Piece("" if self._reply.is_over else self._reply.release(), [], _openai_reason(reason))
        return None


class Completions:
    """The completions of one server process. `on_response` is told of the end of each that began."""

    def __init__(self, engine: Engine, text: TextPipeline, on_response: OnResponse = lambda _: None) -> None:
        self._engine = engine
        self._text = text
        self._on_response = on_response
        self._running: set[str] = set()
        self._is_open = True
        self._idle = asyncio.Event()

    @property
    def num_running(self) -> int:
        """Completions being made now."""
        return len(self._running)

    async def prepare_raw(self, tenant: str, name: str, prompt: str | Sequence[int], wanted: Wanted) -> Completion:
        """The completion of a text or of ids that are a whole prompt already; see `prepare`."""
        prompt_ids = await self._text.encode_raw(prompt) if isinstance(prompt, str) else list(prompt)
        before = prompt_ids[-TOKENS_OF_A_CODE_POINT:]
        return self.prepare(tenant, name, prompt_ids, wanted, before=before, param="prompt")

    def prepare(
        self,
        tenant: str,
        name: str,
        prompt_ids: list[int],
        wanted: Wanted,
        *,
        before: Sequence[int] | None = None,
        param: str,
    ) -> Completion:
        """A completion that can start; its text goes on from the ids `before`, if they are given.

        Raises BadRequest that names `param` where the prompt leaves no room, Unavailable in a drain.
        """
        self._check_open()
        eos_token_ids = () if wanted.ignore_eos else self._text.eos_token_ids
        request = GenerationRequest(
            request_id=name,
            session_id=name,
            tenant=tenant,
            token_ids=prompt_ids,
            num_history=0,
            max_output_tokens=min(wanted.max_tokens, self._room_behind(prompt_ids, param)),
            sampling=wanted.sampling,
            stop_token_ids=eos_token_ids,
        )
        reply = Reply(self._text.detokenizer(before), wanted.stop, eos_token_ids)
        return Completion(wanted, request, reply, self._engine, self._on_response)

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

    def _room_behind(self, prompt_ids: list[int], param: str) -> int:
        room = self._engine.info.max_context - len(prompt_ids)
        if not prompt_ids:
            raise BadRequest("the prompt has no tokens", param=param)
        if room < 1:
            raise BadRequest(
                f"the prompt has {len(prompt_ids)} tokens and the completion needs at least one, but the context "
                f"holds {self._engine.info.max_context}: shorten the prompt",
                code="context_length_exceeded",
                param=param,
            )
        return room


def _openai_reason(reason: FinishReason) -> FinishedBy:
    if reason == "cancelled":
        raise _draining()  # nobody else cancels a completion whose pieces are still read
    return "stop" if reason == "stop" else "length"


def _draining() -> Unavailable:
    return Unavailable(
        "the server is shutting down; send this again in a moment",
        code="server_draining",
        retry_after_ms=RETRY_AFTER_MS,
    )
