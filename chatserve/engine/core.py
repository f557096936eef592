"""The engine without its process: commands in, a step, events out.

A step is three verbs: schedule, run, commit. Where the runner works beside the host, step n is committed after step
n + 1 was launched, so the device never waits. Commands and events are the lists that `wire` carries;
`EngineCore.handle` and the `_*_event` functions at the end are the only places that know their shape.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from chatserve.engine.api import FinishReason, SamplingParams
from chatserve.engine.history import HistoryTable, TokenIds
from chatserve.engine.request import Request
from chatserve.engine.runner import Runner, Step
from chatserve.engine.scheduler import Scheduler, Work
from chatserve.engine.warming import Warming
from kvstore import IntegrityError, KVStore, MemoryRefused, OutOfPages
from kvstore.arrays import TokenArray, common_prefix
from kvstore.planner import EvictionPlanner

OUT_OF_MEMORY = (
    "the system has less memory than the KV budget promises, and nothing is left to evict; "
    "free memory on this machine or lower --kv-device-memory"
)
Event = list[Any]
logger = logging.getLogger(__name__)


class EngineCore:
    """Owns the queue and the store; single-threaded. `step` does nothing when nothing waits or runs.

    `ahead_tokens`: see `Scheduler`. `plan_evictions` starts a planner on the session records at a URL.
    """

    def __init__(
        self,
        store: KVStore,
        runner: Runner,
        *,
        max_context: int,
        max_step_tokens: int,
        max_running: int,
        max_waiting: int,
        ahead_tokens: int = 0,
        plan_evictions: Callable[[str], EvictionPlanner] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.max_context = min(max_context, store.max_session_tokens)
        self._runner = runner
        self._max_waiting = max_waiting
        self._clock = clock
        self._history = HistoryTable()
        self._requests: dict[str, Request] = {}
        self._scheduler = Scheduler(
            store, max_step_tokens=max_step_tokens, max_running=max_running, clock=clock, ahead_tokens=ahead_tokens
        )
        self._plan_evictions = plan_evictions
        self._planner: EvictionPlanner | None = None
        self._warming = Warming(store)
        self._in_flight: Step | None = None
        self._busy_since_s = 0.0
        self._decode_s = 0.0  # how long the last step without prefill took
        self._events: list[Event] = []

    @property
    def idle(self) -> bool:
        """Nothing waits, runs or is in flight."""
        return not self._requests and self._in_flight is None

    @property
    def is_waiting(self) -> bool:
        """Nothing can be computed until something that moves between tiers has arrived."""
        return self._in_flight is None and not self._scheduler.running and not self.idle

    def take_events(self) -> list[Event]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def handle(self, command: dict[str, Any]) -> None:
        """Carry out one command of the front end; unknown verbs are a bug and raise KeyError."""
        verbs: dict[str, Callable[[dict[str, Any]], None]] = {
            "submit": self._submit,
            "cancel": self._cancel,
            "forget": self._forget,
            "warm": self._warm,
            "read_records": self._read_records,
            "query": self._query,
        }
        verbs[command["verb"]](command)

    def step(self) -> None:
        """Schedule, run, commit: what was launched in this step, or the step before if the runner works beside us."""
        self._finish_cancelled(self._scheduler.waiting)
        busy_s = self._expected_s(self._in_flight) if self._in_flight else 0.0
        self.store.tend(busy_s=busy_s, is_awaited=self._scheduler.is_awaited)
        self._warming.go_on()
        work = self._schedule()
        self._refuse_unservable()
        if self._in_flight is None:
            self._busy_since_s = time.perf_counter()
        launched = self._runner.launch(work) if work else None
        self._commit_rows(work)
        if self._runner.overlaps:
            launched, self._in_flight = self._in_flight, launched
        if launched:
            self._commit(launched)
        self._finish_cancelled(self._scheduler.running)  # with what was in flight for them counted

    def offload(self) -> bool:
        """Nothing is to be computed: copy histories to the tiers below. Whether there is more of that to do soon."""
        is_moving = self.store.tend(idle=True)
        return self._warming.go_on() or is_moving

    def rest(self) -> None:
        """Give memory back that nobody needs now. For idle moments; what the system refuses is tried again later."""
        try:
            self.store.shrink()
        except MemoryRefused as refusal:
            logger.warning("idle memory is not given back now: %s", refusal)

    def close(self, timeout_s: float) -> None:
        """End: copy all histories to where they survive, as far as the time allows, and give everything back."""
        if self._planner is not None:
            self._planner.stop()
        if not self.store.flush(time.monotonic() + timeout_s):
            logger.warning("not all histories could be saved in %.0f s; the rest will be computed again", timeout_s)
        self.store.close()

    def _schedule(self) -> list[Work]:
        """The step's work, its rows mapped; requests that the system refuses mappings for give way."""
        work = self._scheduler.schedule()
        while work:
            try:
                self._runner.reserve(work)
                self.store.settle()
                return work
            except OutOfPages:
                self._scheduler.retreat()
                work = [item for item in work if item.lease is item.request.lease]
        return work

    def _commit(self, step: Step) -> None:
        """Count what a step has done. What was computed for a request that has ended or was preempted since is dead."""
        sampled = iter(step.tokens())
        now = self._clock()
        self._note_time(step)
        self._commit_rows(step.work)
        for item in step.work:
            token = next(sampled) if item.samples else None
            if token is not None and item.lease is item.request.lease:
                self._commit_token(item.request, token, now)

    def _note_time(self, step: Step) -> None:
        """The step is over, which began when the one before it ended, or when it was launched."""
        began_s, self._busy_since_s = self._busy_since_s, time.perf_counter()
        took_s = self._busy_since_s - began_s
        num_prefill = _num_prefill(step)
        if num_prefill:
            self.store.note_computed(num_prefill, took_s)
        else:
            self._decode_s = took_s

    def _expected_s(self, step: Step) -> float:
        """How long a step takes, by what such steps took before."""
        num_prefill = _num_prefill(step)
        return self.store.computing_s(num_prefill) if num_prefill else self._decode_s

    def _commit_rows(self, work: Sequence[Work]) -> None:
        """Count the rows whose tokens are known, and share them: launched is as good as written.

        Whatever reads, copies or overwrites them follows on the same stream.
        """
        for item in work:
            lease = item.lease
            known = min(item.end, len(item.request.token_ids))
            if lease is item.request.lease and lease.kv_length < known:
                lease.commit(item.request.token_ids[lease.kv_length : known])

    def _commit_token(self, request: Request, token: int, now: float) -> None:
        if request.started_s is None:
            request.started_s = now
            self._events.append(_started_event(request, self._miss_reason(request)))
        request.num_unknown -= 1
        request.token_ids.append(token)
        self._events.append(_tokens_event(request, token))
        if request.finish_reason:
            self._finish(request, request.finish_reason)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self._scheduler.finish(request)
        del self._requests[request.request_id]
        self._history.remember(request.session_id, request.token_ids)
        self._events.append(_finished_event(request, reason, self._clock()))

    def _finish_cancelled(self, requests: Iterable[Request]) -> None:
        for request in [request for request in requests if request.cancelled]:
            self._finish(request, "cancelled")

    def _refuse_unservable(self) -> None:
        while self._scheduler.unservable:
            request = self._scheduler.unservable.pop()
            del self._requests[request.request_id]
            self._events.append(["refused", request.request_id, "queue_full", OUT_OF_MEMORY])

    def _submit(self, command: dict[str, Any]) -> None:
        history = self._history.prefix(command["session_id"], command["num_history"], command["history_hash"])
        sent_whole = command["num_history_sent"] == 0
        if history is None and not sent_whole:
            self._events.append(["need_tokens", command["request_id"]])
            return
        token_ids = array("i") if sent_whole or history is None else history
        token_ids.frombytes(command["token_ids"])
        refusal = self._refusal(len(token_ids), command["num_generated"])
        if refusal:
            self._events.append(["refused", command["request_id"], *refusal])
            return
        self._enqueue(self._request(command, token_ids))

    def _enqueue(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self._scheduler.waiting.append(request)
        if request.finish_reason:  # continued after an interruption that struck between its last token and its end
            request.admitted_s = request.started_s = request.arrived_s
            self._events.append(_started_event(request, None))
            self._finish(request, request.finish_reason)

    def _refusal(self, num_tokens: int, num_generated: int) -> tuple[str, str] | None:
        if num_tokens - num_generated >= self.max_context:
            text = (
                f"the session has {num_tokens} tokens and at most {self.max_context} fit, reply included; "
                "start a new session, fork at an earlier message, or raise --max-context or --kv-device-memory"
            )
            return "context_length_exceeded", text
        if len(self._scheduler.waiting) >= self._max_waiting:
            return "queue_full", f"{self._max_waiting} requests are waiting already; try again later"
        return None

    def _request(self, command: dict[str, Any], token_ids: TokenIds) -> Request:
        num_prompt = len(token_ids) - command["num_generated"]
        asked = num_prompt + command["max_output_tokens"]
        return Request(
            request_id=command["request_id"],
            session_id=command["session_id"],
            salt=command["tenant"].encode(),
            token_ids=token_ids,
            num_prompt=num_prompt,
            max_tokens=min(asked, self.max_context),
            limit_reason="max_output_tokens" if asked <= self.max_context else "context_window",
            sampling=SamplingParams(**command["sampling"]),
            stop_token_ids=frozenset(command["stop_token_ids"]),
            reuse=command["reuse"],
            num_computed=command["num_computed"],
            history_known=command["session_id"] in self._history,
            arrived_s=self._clock(),
        )

    def _cancel(self, command: dict[str, Any]) -> None:
        request = self._requests.get(command["request_id"])
        if request:
            request.cancelled = True

    def _forget(self, command: dict[str, Any]) -> None:
        session_id = command["session_id"]
        for request in [r for r in self._requests.values() if r.session_id == session_id]:
            self._finish(request, "cancelled")
        self.store.drop_session(session_id)
        histories = [(np.frombuffer(packed, np.int32), num_kept) for packed, num_kept in command["histories"]]
        computed = self._history.held(session_id)
        if histories and computed is not None:  # it may end in tokens that a stop string cut off
            histories.append(_like(np.array(computed, np.int32), histories))
        for token_ids, num_kept in histories:
            self.store.forget(session_id, command["tenant"].encode(), token_ids, num_kept)
        self._history.forget(session_id)

    def _warm(self, command: dict[str, Any]) -> None:
        """A turn of this session is likely: bring its history back, and leave it where it is found."""
        tokens = np.frombuffer(command["token_ids"], np.int32)
        self._warming.begin(command["session_id"], command["tenant"].encode(), tokens)

    def _read_records(self, command: dict[str, Any]) -> None:
        """From now on what is evicted depends on what these records say of sessions."""
        if self._plan_evictions is not None and self._planner is None:
            self._planner = self._plan_evictions(command["url"])

    def _query(self, command: dict[str, Any]) -> None:
        self._events.append(["reply", command["query_id"], self._answer(command)])

    def _answer(self, command: dict[str, Any]) -> Any:
        if command["what"] == "cached_tokens":
            return self._held(command)
        if command["what"] == "is_forgetting":
            return self.store.is_forgetting
        if command["what"] == "check_integrity":
            return self._integrity_fault()
        return self._stats()

    def _stats(self) -> dict[str, Any]:
        queue = {"num_waiting": len(self._scheduler.waiting), "num_running": len(self._scheduler.running)}
        return self.store.stats().as_map() | queue

    def _held(self, command: dict[str, Any]) -> dict[str, Any]:
        history = command["session_id"], command["tenant"].encode(), np.frombuffer(command["token_ids"], np.int32)
        return {"tokens": self.store.held_tokens(*history), "restore_s": self.store.restore_s(*history)}

    def _integrity_fault(self) -> str | None:
        """What is wrong with the store's books, if anything: reported, never a reason to stop serving."""
        try:
            self.store.check_integrity()
        except IntegrityError as fault:
            return str(fault)
        return None

    def _miss_reason(self, request: Request) -> str | None:
        """Why less of the history was there than could have been; None where it was computed sooner than read."""
        failure = self._warming.take_failure(request.session_id) or request.read_failure
        if request.num_missing <= 0:
            return None
        if not request.reuse:
            return "input_changed"
        if failure is not None:
            return failure
        if request.missing == "below":
            return None
        if request.missing == "expired":
            return "expired"
        if request.history_known:
            return "evicted"
        return "model_changed" if self.store.holds_foreign_pages else "not_saved"


def _like(token_ids: TokenArray, histories: Sequence[tuple[TokenArray, int]]) -> tuple[TokenArray, int]:
    """A history with as much of it kept as is kept of those that begin like it."""
    return token_ids, max(min(num_kept, common_prefix(token_ids, other)) for other, num_kept in histories)


def _num_prefill(step: Step) -> int:
    return sum(item.num_tokens for item in step.work if item.num_tokens > 1)


def _started_event(request: Request, miss_reason: str | None) -> Event:
    assert request.admitted_s is not None
    assert request.started_s is not None
    restore_ms = request.restored_s * 1000
    queue_ms = max(0.0, (request.admitted_s - request.arrived_s) * 1000 - restore_ms)
    prefill_ms = (request.started_s - request.admitted_s) * 1000
    restored = {tier: count for tier, count in request.num_restored.items() if count}
    cached = {"device": request.num_cached_tokens - sum(restored.values()), **restored}
    return ["started", request.request_id, cached, queue_ms, restore_ms, prefill_ms, miss_reason]


def _tokens_event(request: Request, token: int) -> Event:
    return ["tokens", request.request_id, [token]]


def _finished_event(request: Request, reason: FinishReason, now: float) -> Event:
    decode_ms = 0.0 if request.started_s is None else (now - request.started_s) * 1000
    return ["finished", request.request_id, reason, decode_ms]
