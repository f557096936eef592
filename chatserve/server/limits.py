"""What each tenant may have computed, held at the one place that everything passes on its way to the engine.

A turn is refused before anything of it is stored. Tokens are charged as they are computed, so a turn that began may
overdraw; the next one waits until the debt is paid. Cached tokens cost nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from chatserve.api_keys import TenantLimits
from chatserve.engine.api import Engine, EngineInfo, Forgotten, GenerationRequest, Held, Progress, Started, Tokens
from chatserve.errors import Overloaded

MIN_RETRY_MS = 250
MAX_RETRY_MS = 60_000
SLOT_RETRY_MS = 1000
_WEIGHT_OF_NEWEST = 0.1


class TokenBudget:
    """Tokens of one tenant: a minute's worth at most, refilled as time passes, below zero where overdrawn."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self._per_minute = per_minute
        self._balance = float(per_minute)
        self._updated_s = now_s

    def charge(self, num_tokens: int, now_s: float) -> None:
        """Tokens were computed."""
        self._refill(now_s)
        self._balance -= num_tokens

    def wait_s(self, now_s: float) -> float:
        """Seconds until there is something to spend; 0 now."""
        self._refill(now_s)
        return max(0.0, (1 - self._balance) * 60 / self._per_minute)

    def _refill(self, now_s: float) -> None:
        earned = (now_s - self._updated_s) * self._per_minute / 60
        self._balance = min(self._balance + earned, float(self._per_minute))
        self._updated_s = now_s


class TurnLimiter:
    """Counts what runs and waits, in all and by tenant. `clock` gives seconds.

    `max_turns` may run and wait in all. Where there are several tenants, one may have half of that, so that the others
    are not locked out.
    """

    def __init__(
        self,
        limits: Mapping[str, TenantLimits],
        defaults: TenantLimits,
        *,
        max_turns: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._defaults = defaults
        self._max_turns = max_turns
        self._max_share = max_turns if len(limits) < 2 else max(1, max_turns // 2)
        self._clock = clock
        self._turns: Counter[str] = Counter()
        self._budgets: dict[str, TokenBudget] = {}
        self._turn_s = 1.0

    def limits_of(self, tenant: str) -> TenantLimits:
        """What this tenant may use."""
        return self._limits.get(tenant, self._defaults)

    def enter(self, tenant: str) -> float:
        """Count a turn, and give when it began; raises Overloaded where the tenant or the server has no room."""
        self._check_server(tenant)
        self._check_turns(tenant)
        self._check_tokens(tenant)
        self._turns[tenant] += 1
        return self._clock()

    def leave(self, tenant: str, began_s: float) -> None:
        """A counted turn is over."""
        self._turn_s += (self._clock() - began_s - self._turn_s) * _WEIGHT_OF_NEWEST
        self._turns[tenant] -= 1
        if not self._turns[tenant]:
            del self._turns[tenant]

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Tokens were computed for the tenant."""
        budget = self._budget(tenant)
        if budget is not None:
            budget.charge(num_tokens, self._clock())

    def _check_server(self, tenant: str) -> None:
        if self._turns.total() >= self._max_turns:
            text = f"{self._max_turns} turns run and wait already, the most there may be; try again later"
        elif self._turns[tenant] >= self._max_share:
            text = f"this key has {self._max_share} turns running and waiting, half of all there may be"
        else:
            return
        raise Overloaded(text, retry_after_ms=self._retry_ms(self._turn_s))

    def _check_turns(self, tenant: str) -> None:
        most = self.limits_of(tenant).turns
        if most is not None and self._turns[tenant] >= most:
            raise Overloaded(
                f"this key has {most} turns running and waiting, the most it may; try again when one has ended",
                code="rate_limited",
                retry_after_ms=self._retry_ms(self._turn_s / most),
            )

    def _check_tokens(self, tenant: str) -> None:
        budget = self._budget(tenant)
        wait_s = budget.wait_s(self._clock()) if budget else 0.0
        if wait_s:
            raise Overloaded(
                f"this key has used its {self.limits_of(tenant).tokens_per_minute} tokens a minute; try again later",
                code="rate_limited",
                retry_after_ms=self._retry_ms(wait_s),
            )

    def _budget(self, tenant: str) -> TokenBudget | None:
        """The tenant's budget, where it has one; tenants are those of keys, so there are few."""
        per_minute = self.limits_of(tenant).tokens_per_minute
        if per_minute is None:
            return None
        if tenant not in self._budgets:
            self._budgets[tenant] = TokenBudget(per_minute, self._clock())
        return self._budgets[tenant]

    def _retry_ms(self, seconds: float) -> int:
        return min(max(int(seconds * 1000), MIN_RETRY_MS), MAX_RETRY_MS)


class Slots:
    """Places for work that takes much, such as imports: `most` in all, `most_of_one` of one tenant."""

    def __init__(self, what: str, most: int, most_of_one: int) -> None:
        self._what = what
        self._most = most
        self._most_of_one = most_of_one
        self._taken: Counter[str] = Counter()

    @contextmanager
    def taken(self, tenant: str) -> Iterator[None]:
        """Take a place; raises Overloaded where there is none."""
        if self._taken.total() >= self._most or self._taken[tenant] >= self._most_of_one:
            raise Overloaded(
                f"too many {self._what} at a time; send this again in a moment", retry_after_ms=SLOT_RETRY_MS
            )
        self._taken[tenant] += 1
        try:
            yield
        finally:
            self._taken[tenant] -= 1


class LimitedEngine:
    """An engine that takes a request only where its tenant has room; implements `chatserve.engine.api.Engine`."""

    def __init__(self, engine: Engine, limiter: TurnLimiter) -> None:
        self._engine = engine
        self._limiter = limiter

    @property
    def info(self) -> EngineInfo:
        """See `Engine.info`."""
        return self._engine.info

    @property
    def ready(self) -> bool:
        """See `Engine.ready`."""
        return self._engine.ready

    def generate(self, request: GenerationRequest) -> AsyncIterator[Progress]:
        """See `Engine.generate`. Raises Overloaded at once, before the iterator is used; then close the iterator."""
        began_s = self._limiter.enter(request.tenant)
        return _MeteredStream(self._engine.generate(request), request, self._limiter, began_s)

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        self._engine.cancel(request_id)

    def forget_session(self, session_id: str) -> None:
        """See `Engine.forget_session`."""
        self._engine.forget_session(session_id)

    async def delete_session(self, session_id: str, tenant: str, histories: Sequence[Forgotten]) -> None:
        """See `Engine.delete_session`."""
        await self._engine.delete_session(session_id, tenant, histories)

    def warm_session(self, session_id: str, tenant: str, token_ids: Sequence[int]) -> None:
        """See `Engine.warm_session`."""
        self._engine.warm_session(session_id, tenant, token_ids)

    async def stats(self) -> dict[str, Any]:
        """See `Engine.stats`."""
        return await self._engine.stats()

    async def cached_tokens(self, session_id: str, tenant: str, token_ids: Sequence[int]) -> Held:
        """See `Engine.cached_tokens`."""
        return await self._engine.cached_tokens(session_id, tenant, token_ids)


class _MeteredStream:
    """What the engine says of one request, counted; an object and not a generator, so that its end always counts.

    A generator that is closed before it began runs nothing of its own, and would keep its turn for ever.
    """

    def __init__(
        self, source: AsyncIterator[Progress], request: GenerationRequest, limiter: TurnLimiter, began_s: float
    ) -> None:
        self._source = source
        self._request = request
        self._limiter = limiter
        self._began_s = began_s
        self._counts = True

    def __aiter__(self) -> AsyncIterator[Progress]:
        return self

    async def __anext__(self) -> Progress:
        try:
            progress = await anext(self._source)
        except BaseException:  # its end or its failure: either way the turn is over; raised again
            self._leave()
            raise
        self._charge(progress)
        return progress

    async def aclose(self) -> None:
        """End the request, if it has not ended."""
        self._leave()
        close = getattr(self._source, "aclose", None)
        if close is not None:
            await close()

    def _charge(self, progress: Progress) -> None:
        if isinstance(progress, Started):
            num_cached = sum(progress.cached_tokens.values())
            self._limiter.charge(self._request.tenant, max(0, len(self._request.token_ids) - num_cached))
        elif isinstance(progress, Tokens):
            self._limiter.charge(self._request.tenant, len(progress.token_ids))

    def _leave(self) -> None:
        if self._counts:
            self._counts = False
            self._limiter.leave(self._request.tenant, self._began_s)
