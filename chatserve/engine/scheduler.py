"""Decides what the next step computes: who decodes, who prefills how much, who is admitted, who must give way.

It knows requests, leases and the KV store; it does not know the model, the wire or the clock's meaning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from chatserve.engine.request import Request
from kvstore import KVStore, Lease, OutOfPages


@dataclass(frozen=True, slots=True)
class Work:
    """One request's share of a step: its next `num_tokens` tokens get KV rows."""

    request: Request
    num_tokens: int


class Scheduler:
    """Continuous batching under a token budget.

    Decodes go first, one token each. What is left of the budget is shared evenly among prefills, so a long prompt
    delays a short one by no more than its share. The oldest running request is never preempted, hence progress.
    `unservable` collects requests that the system has no memory for although nothing else runs.
    """

    def __init__(self, store: KVStore, *, max_step_tokens: int, max_running: int, clock: Callable[[], float]) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.unservable: list[Request] = []
        self._store = store
        self._layout = store.layout
        self._max_step_tokens = max_step_tokens
        self._max_running = max_running
        self._clock = clock

    def schedule(self) -> list[Work]:
        """The next step's work; empty only when nothing waits or runs, or all that waited went to `unservable`."""
        self._admit()
        work = [Work(request, 1) for request in self._growable_decodes()]
        return work + list(self._share_prefill(self._max_step_tokens - len(work)))

    def finish(self, request: Request) -> None:
        """Take the request out wherever it is and release its pages to the index."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._release(request)

    def requests(self) -> Iterator[Request]:
        """All requests, running first."""
        yield from self.running
        yield from self.waiting

    def _admit(self) -> None:
        """Admit in order of arrival. Who waits for a leader lets others pass; who waits for memory does not."""
        blocked: list[Request] = []
        while self.waiting and len(self.running) < self._max_running:
            request = self.waiting.popleft()
            if self._waits_for_leader(request):
                blocked.append(request)
            elif not self._try_admit(request):
                # With nothing running all memory is to be had: waiting would be for ever.
                (blocked if self.running else self.unservable).append(request)
                break
        self.waiting.extendleft(reversed(blocked))

    def _try_admit(self, request: Request) -> bool:
        lease = self._lease_whole_prompt(request)
        if lease is None:
            return False
        request.lease = lease
        if request.admitted_s is None:
            request.admitted_s = self._clock()
            request.num_cached_tokens = lease.num_cached_tokens
        self.running.append(request)
        return True

    def _lease_whole_prompt(self, request: Request) -> Lease | None:
        """Rows for every token the request has, or None with nothing held: two half-admitted ones could deadlock."""
        try:
            lease = self._store.lease(request.session_id, request.salt, request.token_ids, reuse=request.reuse)
        except OutOfPages:
            return None
        try:
            lease.grow(len(request.token_ids))
        except OutOfPages:
            lease.release()
            return None
        return lease

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
        tokens = np.asarray(request.token_ids)
        for other in self.running:
            if other.num_pending > 1 and other.salt == request.salt:
                shared = _common_prefix(tokens, np.asarray(other.token_ids))
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
        needed = len(request.token_ids)
        while lease.capacity_tokens < needed:
            try:
                lease.grow(needed)
            except OutOfPages:
                victim = self.running[-1]
                self._preempt(victim)
                if victim is request:
                    return False
        return True

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue: its tokens stay, its pages become evictable."""
        self.running.remove(request)
        self._release(request)
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        if request.lease is not None:
            request.lease.release()
            request.lease = None

    def _share_prefill(self, budget: int) -> Iterable[Work]:
        """Split `budget` tokens evenly, shortest first so that what a short prompt leaves goes to the longer ones."""
        prefills = sorted((r for r in self.running if r.num_pending > 1), key=lambda r: r.num_pending)
        for index, request in enumerate(prefills):
            num_tokens = min(request.num_pending, max(1, budget // (len(prefills) - index)))
            if budget <= 0:
                return
            budget -= num_tokens
            yield Work(request, num_tokens)


def _common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if len(different) else length
