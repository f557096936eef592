"""What a turn cost and what it reused: the usage, cache and timings objects."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import cast

from chatserve.engine.api import Started
from chatserve.protocol.events import Cache, MissReason, Tier, Timings, Usage, usage_object

_TIERS: tuple[Tier, ...] = ("device", "host", "disk")  # fastest first


def within_input(cached_tokens: Mapping[str, int], num_input: int) -> dict[str, int]:
    """The cached tokens by tier, none counted beyond the input (a continued response reuses its own tokens too)."""
    left = num_input
    counted: dict[str, int] = {}
    for tier in _TIERS:
        counted[tier] = min(cached_tokens.get(tier, 0), left)
        left -= counted[tier]
    return counted


def cache_object(
    cached_tokens: Mapping[str, int], *, num_history: int, planned_reason: str | None, engine_reason: str | None
) -> Cache:
    """How much of what could be reused was.

    An earlier turn computed `num_history` tokens, but the last one sampled never had a KV row: with one less cached
    it is a hit. Where `planned_reason` says that the history itself fell short (a first turn, a changed template), a
    beginning shared with anything else counts as partial. No reason where computing again was sooner than reading.
    """
    num_cached = sum(cached_tokens.values())
    slowest = next((tier for tier in reversed(_TIERS) if cached_tokens.get(tier)), None)
    if planned_reason is None and num_cached >= num_history - 1:
        return {"result": "hit", "restored_from": slowest, "reason": None}
    reason = cast("MissReason | None", planned_reason or engine_reason)
    return {"result": "partial" if num_cached else "miss", "restored_from": slowest, "reason": reason}


class Account:
    """The running account of one response with `num_input` tokens; see `cache_object` for the other two.

    `resumed`: it was interrupted and went on. Times are taken when it is told of something.
    """

    def __init__(self, *, num_input: int, num_history: int, planned_reason: str | None) -> None:
        self.cache: Cache | None = None
        self.resumed = False
        self._num_input = num_input
        self._num_history = num_history
        self._planned_reason = planned_reason
        self._cached_tokens: dict[str, int] = {}
        self._started: Started | None = None
        self._began_s = time.perf_counter()
        self._first_s: float | None = None
        self._last_s = 0.0
        self._decode_ms: float | None = None

    def start(self, started: Started) -> bool:
        """Note that prefill is done; whether that is news (a continued response may have told before it broke off)."""
        self._started = started
        if self.cache is not None:
            return False
        self._cached_tokens = within_input(started.cached_tokens, self._num_input)
        self.cache = cache_object(
            self._cached_tokens,
            num_history=self._num_history,
            planned_reason=self._planned_reason,
            engine_reason=started.miss_reason,
        )
        return True

    def restore(self, usage: Usage, cache: Cache) -> None:
        """Go on from what was told before the interruption."""
        self.cache = cache
        self._cached_tokens = dict(cast(Mapping[str, int], usage["cached_tokens_details"]))

    def note_tokens(self) -> None:
        """Tokens have come."""
        self._last_s = time.perf_counter()
        self._first_s = self._first_s or self._last_s

    def finish(self, decode_ms: float) -> None:
        """The engine is done with it."""
        self._decode_ms = decode_ms

    @property
    def queue_ms(self) -> float:
        """How long it waited for the engine."""
        return round(self._started.queue_ms, 3) if self._started else 0.0

    def usage(self, num_output: int) -> Usage:
        """The usage object."""
        return usage_object(input_tokens=self._num_input, output_tokens=num_output, cached_tokens=self._cached_tokens)

    def timings(self, num_output: int) -> Timings:
        """The timings object; the rate counts the tokens after the first. Of a continued response: of its last part."""
        first_s = self._first_s or self._began_s
        decode_ms = (self._last_s - first_s) * 1000 if self._decode_ms is None else self._decode_ms
        return {
            "queue_ms": self.queue_ms,
            "restore_ms": round(self._started.restore_ms, 3) if self._started else 0.0,
            "prefill_ms": round(self._started.prefill_ms, 3) if self._started else 0.0,
            "ttft_ms": round((first_s - self._began_s) * 1000, 3),
            "decode_ms": round(max(decode_ms, 0.0), 3),
            "tokens_per_second": round((num_output - 1) * 1000 / decode_ms, 3)
            if num_output > 1 and decode_ms > 0
            else 0.0,
        }
