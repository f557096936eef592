"""Evicts first what is least worth keeping: `probability of return x cost to bring back / bytes`, by session records.

How likely returns are stands in a `Plan`, which `kvstore.planner` learns and replaces as a whole; here it is only read,
so nothing on a step's path waits. Ranks fall with time. It does not know trees, pages or where records come from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.eviction import Leaf

FIRST_AGE_S = 4.0
BINS_PER_OCTAVE = 2
NUM_BINS = 32
# Edges of the bins of ages: close together at first, 3 days at last. A curve has one value at each of them.
AGE_EDGES_S: npt.NDArray[np.float64] = FIRST_AGE_S * (2.0 ** (np.arange(NUM_BINS + 1) / BINS_PER_OCTAVE) - 1.0)
OLDEST_S = float(AGE_EDGES_S[-1])

PRIOR_RETURNS = 0.5  # before anything was learned: how much less likely a return gets each time the age doubles
PRIOR_AGE_S = 10.0
PRIOR_HAZARD: npt.NDArray[np.float64] = PRIOR_RETURNS / (PRIOR_AGE_S + AGE_EDGES_S)  # returns per second at the edges

RECHECK_FRACTION = 1 / 8  # of its age: a rank is asked for again before it can have changed much
MIN_RECHECK_S = 1.0
MAX_RECHECK_S = 60.0  # also how long a change of its record may stay unnoticed where it lowers the rank


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """What a token's rows cost to bring back, by rates measured on the machine at hand.

    `prefill_tokens_per_s` holds at the beginning of a context, `long_prefill_tokens_per_s` at `long_context_tokens`:
    attention makes later tokens dearer. `restore_bytes_per_s` is the rate of copies from the tier below, None without
    one. Raises ValueError when a number is not positive.
    """

    token_bytes: int
    prefill_tokens_per_s: float
    long_prefill_tokens_per_s: float
    long_context_tokens: int
    restore_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("token_bytes", "prefill_tokens_per_s", "long_prefill_tokens_per_s", "long_context_tokens"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        if self.restore_bytes_per_s is not None and self.restore_bytes_per_s <= 0:
            raise ValueError(
                f"restore_bytes_per_s={self.restore_bytes_per_s}: must be positive, or None without a tier"
            )

    @classmethod
    def flat(cls, token_bytes: int, prefill_tokens_per_s: float) -> TokenCosts:
        """Every token costs the same, wherever it stands: what a hit rate in tokens counts."""
        return cls(token_bytes, prefill_tokens_per_s, prefill_tokens_per_s, 1)

    def recompute_s(self, num_tokens: int) -> float:
        """Seconds for the token that follows `num_tokens` others; they grow linearly."""
        first, later = 1 / self.prefill_tokens_per_s, 1 / self.long_prefill_tokens_per_s
        return first + max(0.0, later - first) * num_tokens / self.long_context_tokens

    def per_byte_s(self, num_tokens: int) -> float:
        """Seconds a byte to bring back that token, in the cheaper of the ways there are."""
        recompute_s = self.recompute_s(num_tokens) / self.token_bytes
        return recompute_s if self.restore_bytes_per_s is None else min(recompute_s, 1 / self.restore_bytes_per_s)


def rate_at(curve: Sequence[float], age_s: float) -> float:
    """A curve's value at an age, between the edges' values; beyond the last one it falls with the age."""
    if age_s >= OLDEST_S:
        return curve[-1] * OLDEST_S / age_s
    place = BINS_PER_OCTAVE * math.log2(1.0 + age_s / FIRST_AGE_S)
    edge = min(int(place), NUM_BINS - 1)
    return curve[edge] + (curve[edge + 1] - curve[edge]) * (place - edge)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is to be expected of one session. `active_s` is its last sign of life, in seconds since the epoch.

    `curve` gives returns per second by age, for a person of average pace; this one takes `pace` times as long.
    `weight` is what its priority and its pin make of that.
    """

    active_s: float
    curve: Sequence[float]
    pace: float = 1.0
    weight: float = 1.0

    def rate(self, now_s: float) -> float:
        """Weighted returns per second at `now_s`; less the longer nothing was heard."""
        age_s = max(0.0, now_s - self.active_s) / self.pace
        return self.weight * rate_at(self.curve, age_s) / self.pace


@dataclass(frozen=True, slots=True)
class Plan:
    """What a planner knows: an outlook by session id, and the curve of a session that it knows nothing about.

    Turns before `known_until_s`, in seconds since the epoch, are in the outlooks; later ones may not be.
    """

    sessions: Mapping[str, Outlook] = field(default_factory=dict)
    stranger: Sequence[float] = tuple(PRIOR_HAZARD.tolist())
    known_until_s: float = -math.inf


class ReturnPolicy:
    """Ranks a leaf by the seconds that keeping its last page saves, per byte and second: see `Plan` and `TokenCosts`.

    Values fall with time instead of counting uses. A heap of ranks alone would not notice that: a leaf of high rank
    would keep it for ever. So the policy is a `DecayingPolicy`: each leaf is asked again whenever its age has grown by
    an eighth (curves are steps in the logarithm of the age), which is a few times a minute for a young leaf and once a
    minute for an old one, never a sort of all. Between these times a rank may only rise, and that is seen at once.

    Without a planner, or with one whose records stopped, ages come from the index, by the store's own clock: a use that
    is in no record counts as that of a stranger, and strangers go by age.
    """

    def __init__(
        self,
        costs: TokenCosts,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.plan = Plan()
        self._costs = costs
        self._clock = clock
        self._wall_clock = wall_clock

    def now_s(self) -> float:
        """The store's clock."""
        return self._clock()

    def recheck_at_s(self, leaf: Leaf) -> float:
        """When the leaf's age will have grown by an eighth."""
        now_s = self._clock()
        return now_s + min(max((now_s - leaf.last_used_s) * RECHECK_FRACTION, MIN_RECHECK_S), MAX_RECHECK_S)

    def rank(self, leaf: Leaf) -> float:
        """Seconds saved per byte and second. The same whatever the order of the leaf's sessions."""
        return self._returns_per_s(leaf) * self._costs.per_byte_s(leaf.num_tokens)

    def _returns_per_s(self, leaf: Leaf) -> float:
        plan, now_s = self.plan, self._wall_clock()
        idle_s = max(0.0, self._clock() - leaf.last_used_s)
        session_ids = leaf.session_ids
        known = [outlook for session_id in session_ids if (outlook := plan.sessions.get(session_id))]
        if not known:
            return max(1, sum(1 for _ in session_ids)) * rate_at(plan.stranger, idle_s)
        rate = math.fsum(outlook.rate(now_s) for outlook in known)
        if now_s - idle_s >= plan.known_until_s:
            rate += rate_at(plan.stranger, idle_s)
        return rate if len(known) == 1 else rate + _shared_rate(known, now_s, idle_s)


def _shared_rate(known: Sequence[Outlook], now_s: float, idle_s: float) -> float:
    """New sessions per second that begin with what these share, at the rate at which these did, if none came for long.

    It takes two to share by chance, so the third is the first that tells of a rate.
    """
    span_s = now_s - min(outlook.active_s for outlook in known)
    return min((len(known) - 2) / max(span_s, 1.0), 1.0 / max(idle_s, 1.0))
