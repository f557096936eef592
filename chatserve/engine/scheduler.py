"""Decides what the next step computes: who decodes, who prefills how much, who is admitted, who must give way.

It knows requests, leases and the KV store; it does not know the model, the wire or the clock's meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from chatserve.engine.request import Request
from chatserve.engine.waiting import WaitingQueue
from kvstore import KVStore, Lease, OutOfPages
from kvstore.arrays import common_prefix
from kvstore.promotion import Promotion
from kvstore.results import Missing

OLDEST_SHARE = 4  # the oldest prefill gets at least this fraction of a step
PROMOTED_AHEAD = 8  # waiting requests whose histories are brought back before there is room for them


@dataclass(frozen=True, slots=True)
class Work:
    """One request's share of a step: its tokens [start, start + num_tokens) get KV rows.

    `samples` when the request's next token follows from them. Work whose `lease` is no longer the request's is dead.
    """

    request: Request
    lease: Lease
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        """Tokens of the request that have rows after the step."""
        return self.start + self.num_tokens


class Scheduler:
    """Continuous batching under a token budget.

    Decodes go first, one token each. Of what is left the oldest prefill is sure of a quarter, so a long prompt is never
    stuck; the rest goes to the shortest first, so a short one does not wait for a long one either. The oldest running
    request is never preempted, hence progress. `ahead_tokens` more rows than needed are mapped where memory allows.
    `unservable` collects requests that the system has no memory for although nothing else runs.
    """

    def __init__(
        self,
        store: KVStore,
        *,
        max_step_tokens: int,
        max_running: int,
        clock: Callable[[], float],
        ahead_tokens: int = 0,
    ) -> None:
        self.waiting = WaitingQueue()
        self.running: list[Request] = []
        self.unservable: list[Request] = []
        self._store = store
        self._layout = store.layout
        self._max_step_tokens = max_step_tokens
        self._max_running = max_running
        self._ahead_tokens = ahead_tokens
        self._free_slots = list(range(max_running))
        self._clock = clock

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for a first token."""
        return bool(self.waiting) or any(request.started_s is None for request in self.running)

    def schedule(self) -> list[Work]:
        """The next step's work, decodes first; empty when nothing waits or runs, or all there is is in flight."""
        self._admit()
        work = [_assign(request, 1) for request in self._growable_decodes()]
        return work + list(self._share_prefill(self._max_step_tokens - len(work)))

    def retreat(self) -> None:
        """Preempt the newest request, because the system refused mappings that were promised; alone it cannot run."""
        request = self.running[-1]
        self._preempt(request)
        if not self.running and not self._store.is_moving:
            self.waiting.popleft()
            self.unservable.append(request)

    def finish(self, request: Request) -> None:
        """Take the request out wherever it is and release its pages to the index."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._end_promotion(request)
        self._release(request)

    def _admit(self) -> None:
        """Admit tenants in turn, each in order of arrival.

        Who waits for a leader lets others pass; who waits for memory does not.
        """
        blocked: list[Request] = []
        while self.waiting and self._has_room():
            request = self.waiting.popleft()
            if self._is_coming_back(request) or self._waits_for_leader(request):
                blocked.append(request)
            elif not self._try_admit(request):
                self.waiting.appendleft(request)
                if not self._may_fit_later():
                    self.unservable.append(self.waiting.popleft())
                break
        self.waiting.extendleft(reversed(blocked))
        self._promote_ahead()

    def _promote_ahead(self) -> None:
        """Bring back the histories of those next in line, in their order, as far as there is memory for them."""
        for request in islice(self.waiting, PROMOTED_AHEAD):
            if request.reuse and not self._is_coming_back(request) and not request.has_asked_below:
                break  # no memory: who comes after would find none either

    def _may_fit_later(self) -> bool:
        """Whether memory will become free: by requests that run, copies on their way, histories held for who waits."""
        if self.running or self._store.is_moving:
            return True
        holding = [request for request in self.waiting if request.promotion is not None]
        for request in holding:
            self._end_promotion(request)
            request.has_asked_below = False
        return bool(holding)

    def _is_coming_back(self, request: Request) -> bool:
        """Whether tiers below the device are bringing the request's history back, part by part."""
        if not request.reuse or request.has_asked_below:
            return False
        last = request.promotion
        if last is not None and last.is_awaited:
            self._map_ahead(request, last)
            return True
        request.has_asked_below = last is not None and (last.has_failed or last.is_last or not last.is_over)
        return not request.has_asked_below and self._ask_below(request)

    def _map_ahead(self, request: Request, promotion: Promotion) -> None:
        """Map what has arrived while the rest is on its way: that takes a fifth of the time that copying takes."""
        if promotion.num_arrived != request.num_mapped_ahead:
            request.num_mapped_ahead = promotion.num_arrived
            self._store.map_ahead(request.session_id, request.salt, request.given)

    def _ask_below(self, request: Request) -> bool:
        """Begin with the next part; what has come before it is held until then."""
        try:
            promotion = self._store.promote(request.session_id, request.salt, request.tokens()[:-1])
        except OutOfPages:
            return False  # admission will be refused too, and then this is asked again
        request.has_asked_below = promotion is None
        if promotion is None:
            return False
        self._end_promotion(request)
        request.promotion, request.num_mapped_ahead = promotion, 0
        return True

    def _end_promotion(self, request: Request) -> None:
        promotion, request.promotion = request.promotion, None
        if promotion is not None:
            request.restored_s += promotion.seconds
            request.read_failure = request.read_failure or promotion.failure
            self._store.end_promotion(promotion)

    def _has_room(self) -> bool:
        """Whether another request could get tokens now: rows are mapped for prompts whose turn has come only."""
        share = self._oldest_share
        backlog = sum(min(request.num_pending, share) for request in self.running if request.num_pending > 1)
        return len(self.running) < self._max_running and backlog < self._max_step_tokens

    def _try_admit(self, request: Request) -> bool:
        lease = self._lease_whole_prompt(request)
        if lease is None:
            return False
        request.lease = lease
        request.num_scheduled = lease.kv_length
        request.slot = self._free_slots.pop()
        if request.admitted_s is None:
            request.admitted_s = self._clock()
            request.num_cached_tokens = lease.num_cached_tokens
            request.num_restored = self._store.take_sources(request.session_id, request.salt, request.given)
            request.missing = self._missing(request)
        self._end_promotion(request)
        self.running.append(request)
        return True

    def _missing(self, request: Request) -> Missing | None:
        """Where the rows are that were not found; None where all were."""
        if request.num_missing <= 0:
            return None
        return self._store.missing(request.session_id, request.salt, request.given[: request.num_computed - 1])

    def _lease_whole_prompt(self, request: Request) -> Lease | None:
        """Rows for every token the request has, or None with nothing held: two half-admitted ones could deadlock."""
        try:
            lease = self._store.lease(request.session_id, request.salt, request.tokens(), reuse=request.reuse)
        except OutOfPages:
            return None
        num_tokens = len(request.token_ids)
        if _try_grow(lease, self._with_ahead(request, num_tokens)) or _try_grow(lease, num_tokens):
            return lease
        lease.release()
        return None

    def _waits_for_leader(self, request: Request) -> bool:
        """Whether a running prefill is computing pages this request could map once they are committed."""
        if not (request.reuse and self._store.prefix_sharing):
            return False
        if request.leader is None or request.leader not in self.running:
            request.leader, request.leader_tokens = self._find_leader(request)
        leader = request.leader
        if leader is None:
            return False
        pages = self._layout.complete_pages
        return pages(leader.kv_length) < pages(request.leader_tokens)

    def _find_leader(self, request: Request) -> tuple[Request | None, int]:
        """The running prefill that shares the longest prefix with the request, and that prefix's length in tokens."""
        best: tuple[Request | None, int] = (None, 0)
        for other in self.running:
            if other.num_pending > 1 and other.salt == request.salt:
                shared = common_prefix(request.given, other.given)
                if shared > best[1]:
                    best = (other, shared)
        return best

    def _growable_decodes(self) -> list[Request]:
        """Requests whose next row is mapped; the newest are preempted until the older ones can grow."""
        growing = [request for request in self.running if request.num_pending == 1]
        ready = []
        for request in growing:
            if request.lease is not None and self._grow_or_preempt(request, request.lease):
                ready.append(request)
        return [request for request in ready if request.lease is not None]

    def _grow_or_preempt(self, request: Request, lease: Lease) -> bool:
        needed = request.num_expected
        while lease.capacity_tokens < needed:
            try:
                lease.grow(needed)
            except OutOfPages:
                victim = self.running[-1]
                self._preempt(victim)
                if victim is request:
                    return False
        self._grow_ahead(request, lease)
        return True

    def _grow_ahead(self, request: Request, lease: Lease) -> None:
        """Map the next rows before they are needed, if that costs nobody anything."""
        _try_grow(lease, self._with_ahead(request, request.num_expected))

    def _with_ahead(self, request: Request, num_tokens: int) -> int:
        return max(num_tokens, min(num_tokens + self._ahead_tokens, request.max_tokens))

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue: its tokens stay, its pages become evictable."""
        self.running.remove(request)
        self._release(request)
        request.has_asked_below = False
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        if request.lease is not None:
            self._free_slots.append(request.slot)
            request.lease.release()
            request.lease = None
            request.num_unknown = 0

    @property
    def _oldest_share(self) -> int:
        """Tokens a step that the oldest prefill is sure of."""
        return -(-self._max_step_tokens // OLDEST_SHARE)

    def _share_prefill(self, budget: int) -> Iterator[Work]:
        """Give out `budget` tokens: a part to the oldest prefill, then all to the shortest, in order of arrival."""
        prefills = [request for request in self.running if request.num_pending > 1]
        by_length = sorted(prefills, key=lambda request: request.num_pending)
        reserved = min(self._oldest_share, prefills[0].num_pending) if prefills else 0
        for request in by_length:
            kept = 0 if request is prefills[0] else reserved
            num_tokens = min(request.num_pending, budget - kept)
            if request is prefills[0]:
                reserved = 0
            if num_tokens > 0:
                budget -= num_tokens
                yield _assign(request, num_tokens)


def _try_grow(lease: Lease, num_tokens: int) -> bool:
    try:
        lease.grow(num_tokens)
    except OutOfPages:
        return False
    return True


def _assign(request: Request, num_tokens: int) -> Work:
    """Hand the request's next tokens to a step."""
    assert request.lease is not None
    start = request.num_scheduled
    request.num_scheduled += num_tokens
    samples = request.num_scheduled == request.num_expected
    request.num_unknown += samples
    return Work(request, request.lease, start, num_tokens, samples)
