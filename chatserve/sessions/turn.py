"""One running response: from the engine's tokens to events and, always, exactly one terminal event.

It goes on from the log where it was interrupted before. It decides nothing about whether a turn may run, and does not
know who follows it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from typing import cast

from chatserve.engine.api import Engine, Finished, FinishReason, GenerationRequest, Progress, Resumed, Started, Tokens
from chatserve.errors import Overloaded, ServiceError
from chatserve.logs import bind
from chatserve.protocol import events
from chatserve.sessions.accounting import Account
from chatserve.sessions.ending import Outcome, Said, failure, last_events, message_of, response_of
from chatserve.sessions.limits import SessionLimits
from chatserve.sessions.plan import TurnPlan
from chatserve.sessions.ports import Store
from chatserve.sessions.recovery import CannotContinue, LoggedProgress, read_progress
from chatserve.sessions.reply import Reply
from chatserve.sessions.session import LiveSession
from chatserve.sessions.tree import path_to, prompt_path
from chatserve.sessions.writer import TurnWriter
from chatserve.storage.session_store import MessageRecord, StorageUnavailable
from chatserve.text.pipeline import TextPipeline

logger = logging.getLogger(__name__)
_TOKENS_OF_A_CODE_POINT = 4


@dataclass(frozen=True, slots=True)
class TurnTools:
    """What every turn of a process works with."""

    engine: Engine
    text: TextPipeline
    store: Store
    limits: SessionLimits
    on_response: Callable[[events.Event], None]


class Turn:
    """Makes one response. Without `prompt_ids` it is one that was interrupted, and goes on from the log."""

    def __init__(self, live: LiveSession, plan: TurnPlan, prompt_ids: list[int] | None, tools: TurnTools) -> None:
        self.plan = plan
        self.finished = False
        self._live = live
        self._tools = tools
        self._prompt_ids = prompt_ids or []
        self._recovers = prompt_ids is None
        self._reply = Reply(tools.text.detokenizer(), (), ())
        self._logged_text = ""
        self._account = Account(
            num_input=plan.num_prompt, num_history=plan.num_history, planned_reason=plan.miss_reason
        )
        self._writer = self._new_writer()
        self._ahead: tuple[AsyncGenerator[Progress, None], asyncio.Future[Progress]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._consuming: asyncio.Task[FinishReason] | None = None
        self._done = asyncio.Event()
        self._is_stopping = False
        self._lost: StorageUnavailable | None = None

    @property
    def response_id(self) -> str:
        """The response this turn makes."""
        return self.plan.response_id

    def run_ahead(self) -> None:
        """Let the engine begin while the turn is still being accepted; then `start` or `discard` it."""
        stream = self._open_stream()
        self._ahead = stream, asyncio.ensure_future(anext(stream))

    async def discard(self) -> None:
        """The turn was not accepted: nothing of it is written."""
        await self._leave_ahead()
        await self._writer.close()

    def start(self, on_done: Callable[[], None]) -> None:
        """Run in a task; `on_done` is called at its end, whatever that is."""
        self._task = asyncio.create_task(self._run(), name=f"turn-{self.response_id}")
        self._task.add_done_callback(lambda _: on_done())

    def stop(self) -> None:
        """End the response as cancelled, with what it has said; an engine that does not answer is left behind."""
        if not self._is_stopping:
            self._is_stopping = True
            self._tools.engine.cancel(self.response_id)
            asyncio.get_running_loop().call_later(self._tools.limits.cancel_grace_s, self._leave_engine)

    def abandon(self) -> None:
        """End without a terminal event: whoever has the session next goes on with this response."""
        if self._task is not None:
            self._task.cancel()

    async def wait_done(self) -> None:
        """Return when the turn is over, finished or abandoned."""
        await self._done.wait()

    def _new_writer(self) -> TurnWriter:
        return TurnWriter(self._live, self.plan, self._tools.limits, self._end_unstored)

    async def _run(self) -> None:
        bind(session_id=self._live.id, response_id=self.response_id)
        try:
            outcome = await self._outcome()
            await self._finish(outcome)
            self.finished = True
        except ServiceError as error:
            logger.warning("response %s is left to whoever has its session now: %s", self.response_id, error)
        except Exception:  # the session is looked after by whoever waits for this task's end
            logger.exception("response %s could not be ended", self.response_id)
        finally:
            await self._leave_ahead()
            await self._writer.close()
            self._done.set()

    async def _outcome(self) -> Outcome:
        try:
            self._reply = self._new_reply()
            if self._recovers:
                await self._go_back_to_log()
            return self._outcome_of("stop" if self._reply.is_over else await self._consume_or_stop())
        except ServiceError as error:
            return failure(error)
        except Exception:  # whatever the fault, the response must end in a terminal event
            logger.exception("response %s failed", self.response_id)
            return failure()

    def _outcome_of(self, reason: FinishReason) -> Outcome:
        if reason == "stop":
            return Outcome("completed")
        if reason == "cancelled":
            return failure(self._lost) if self._lost else Outcome("cancelled")
        is_full = reason == "context_window" or self.plan.fills_window
        return Outcome("incomplete", "context_window" if is_full else "max_output_tokens")

    async def _consume_or_stop(self) -> FinishReason:
        """Take the engine's tokens until it ends, we are told to stop, or the session is no longer ours."""
        self._consuming = asyncio.create_task(self._consume(), name=f"consume-{self.response_id}")
        try:
            await asyncio.wait({self._consuming, self._writer.task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._consuming.cancel()
            await asyncio.wait({self._consuming})
        if self._consuming.cancelled():
            if self._writer.task.done():
                await self._writer.task
            return "cancelled"
        return self._consuming.result()

    async def _consume(self) -> FinishReason:
        while True:
            try:
                return await self._consume_stream()
            except Overloaded:
                if not self._recovers:  # a response that was accepted before a restart waits instead
                    raise
            await asyncio.sleep(self._tools.limits.requeue_delay_s)

    async def _consume_stream(self) -> FinishReason:
        if self._is_stopping:
            return "cancelled"
        (stream, first), self._ahead = self._ahead or (self._open_stream(), None), None
        async with aclosing(stream):
            reason = self._take(await first) if first else None
            if reason is not None:
                return reason
            async for progress in stream:
                reason = self._take(progress)
                if reason is not None:
                    return reason
        raise ServiceError("the engine ended this response without a reason")

    def _open_stream(self) -> AsyncGenerator[Progress, None]:
        return cast(AsyncGenerator[Progress, None], self._tools.engine.generate(self._request()))

    async def _leave_ahead(self) -> None:
        """Take back what the engine began and nobody waits for."""
        if self._ahead is not None:
            (stream, first), self._ahead = self._ahead, None
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            await stream.aclose()

    def _take(self, progress: Progress) -> FinishReason | None:
        """What one message of the engine means; the reason if it is the last."""
        match progress:
            case Started():
                self._take_started(progress)
            case Tokens(token_ids):
                return self._take_tokens(token_ids)
            case Resumed():
                self._announce_resumed()
            case Finished(reason, decode_ms):
                self._account.finish(decode_ms)
                return reason
        return None

    def _take_started(self, started: Started) -> None:
        self._live.engine_knows = True
        if self._account.start(started) and self._account.cache:
            progress = events.response_in_progress(
                response_id=self.response_id,
                usage=self._account.usage(0),
                queue_ms=self._account.queue_ms,
                cache=self._account.cache,
            )
            self._writer.put_event(progress)

    def _take_tokens(self, token_ids: list[int]) -> FinishReason | None:
        self._account.note_tokens()
        text, taken = self._reply.push(token_ids)
        self._writer.put_text(text, taken)
        return "stop" if self._reply.is_cut else None

    def _announce_resumed(self) -> None:
        self._account.resumed = True
        self._writer.put_event(events.response_resumed(response_id=self.response_id, offset=self._reply.num_shown))

    async def _finish(self, outcome: Outcome) -> None:
        """Write the end; where that is impossible for a fault of ours, a bare failure."""
        try:
            said = self._said()
            await self._write_end(outcome, said)
        except ServiceError:
            raise
        except Exception:  # the terminal event must come, with less in it if need be
            logger.exception("the end of response %s could not be written", self.response_id)
            await self._writer.close()
            self._writer = self._new_writer()
            seen = self._live.messages[self.plan.message_id].text
            await self._write_end(failure(), Said(seen, [], pending_text=seen))

    def _said(self) -> Said:
        if self._logged_text:
            return Said(self._logged_text, [], pending_text=self._logged_text)
        self._writer.put_text("" if self._reply.is_over else self._reply.release(), ())
        token_ids, pending_text = self._reply.kept()
        return Said(self._reply.text, token_ids, pending_text)

    async def _write_end(self, outcome: Outcome, said: Said) -> None:
        response = response_of(self.plan, outcome, said, self._account)
        request = self._live.messages[self.plan.message_id].request
        message = replace(message_of(self.plan, outcome, said, response), request=request)
        meta = {"active": None, "updated_at": self._live.now_ms()}
        await self._writer.finish(last_events(response, outcome), message, meta)
        _log_line(response)
        self._tools.on_response(response)

    def _end_unstored(self, error: StorageUnavailable) -> None:
        if not self._is_stopping:
            self._lost = error
            self.stop()

    def _leave_engine(self) -> None:
        if self._consuming is not None:
            self._consuming.cancel()

    async def _go_back_to_log(self) -> None:
        """Bring text and ids to where the log says they were. Raises CannotContinue where that is impossible."""
        progress = await self._read_log()
        self._logged_text = progress.text
        self._writer.num_sent = len(progress.text)
        if self.plan.model != self._tools.engine.info.model:
            raise CannotContinue(f"the model is {self._tools.engine.info.model!r} now, not {self.plan.model!r}")
        self._prompt_ids = await self._prompt_again()
        text, _ = self._reply.push(progress.token_ids)
        if text != progress.text:
            raise CannotContinue("its tokens give another text now")
        self._logged_text = ""
        self._live.messages[self.plan.message_id].text = text
        if progress.in_progress:
            self._account.restore(progress.in_progress["usage"], progress.in_progress["cache"])
        self._announce_resumed()

    async def _read_log(self) -> LoggedProgress:
        while True:
            try:
                return await read_progress(self._tools.store, self._live.id, self.plan, self._tools.limits)
            except StorageUnavailable:
                await asyncio.sleep(self._tools.limits.store_retry_s)

    async def _prompt_again(self) -> list[int]:
        meta = self._live.meta
        path = prompt_path(self._live.messages, self._path(), self.plan.model)
        prompt = await self._tools.text.prompt(path, None, instructions=meta.instructions, date=meta.template_date)
        if len(prompt.token_ids) != self.plan.num_prompt:
            raise CannotContinue("its prompt cannot be made again")
        return prompt.token_ids

    def _request(self) -> GenerationRequest:
        return self.plan.request(
            self._live.id,
            self._live.meta.tenant,
            [*self._prompt_ids, *self._reply.token_ids],
            num_generated=len(self._reply.token_ids),
            num_known=self.plan.num_history if self._live.engine_knows and not self._recovers else 0,
            eos_token_ids=self._tools.text.eos_token_ids,
        )

    def _new_reply(self) -> Reply:
        """An empty reply; where it goes on from an unfinished one, with half a code point of that, perhaps."""
        spoken = takewhile(lambda message: message.role == "assistant", reversed(self._path()))
        before = list(chain.from_iterable(message.token_ids for message in list(spoken)[::-1]))
        detokenizer = self._tools.text.detokenizer(before[-_TOKENS_OF_A_CODE_POINT:] or None)
        return Reply(detokenizer, self.plan.stop, () if self.plan.ignore_eos else self._tools.text.eos_token_ids)

    def _path(self) -> Sequence[MessageRecord]:
        return path_to(self._live.messages, self._live.messages[self.plan.parent_id])


def _log_line(response: events.Event) -> None:
    usage, timings = response["usage"], response["timings"]
    logger.info(
        "response %s",
        response["status"],
        extra={
            "input_tokens": usage["input_tokens"],
            "cached_tokens": usage["input_tokens_details"]["cached_tokens"],
            "output_tokens": usage["output_tokens"],
            "ttft_ms": timings["ttft_ms"],
            "tokens_per_second": timings["tokens_per_second"],
        },
    )
