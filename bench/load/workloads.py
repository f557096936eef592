"""Who says how much to whom: sessions of several turns, in token counts, and the random token ids they say."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

FIRST_ORDINARY_TOKEN = 300  # past special tokens and single bytes


@dataclass(frozen=True, slots=True)
class Workload:
    """`sessions` that begin at once and take `turns` each, greedy and without an early end.

    All begin with the same `system_tokens`, then each turn brings `input_tokens` (the first one `first_tokens`, if
    given) and is answered with `output_tokens`. The next turn starts `think_s` seconds after the end of the last.
    """

    name: str
    sessions: int
    turns: int
    input_tokens: int
    output_tokens: int
    system_tokens: int = 0
    first_tokens: int | None = None
    think_s: float = 0.0

    def scaled(self, factor: float) -> Workload:
        """The same with fewer sessions and shorter texts; as many turns."""
        first = None if self.first_tokens is None else _scaled(self.first_tokens, factor)
        return replace(
            self,
            sessions=_scaled(self.sessions, factor),
            input_tokens=_scaled(self.input_tokens, factor),
            output_tokens=max(4, _scaled(self.output_tokens, factor)),
            system_tokens=_scaled(self.system_tokens, factor) if self.system_tokens else 0,
            first_tokens=first,
        )

    def input_ids(self, session: int, turn: int, *, seed: str, vocab_size: int) -> list[int]:
        """What the session says at this turn, with the common beginning at the first."""
        count = self.first_tokens if turn == 0 and self.first_tokens is not None else self.input_tokens
        own = random_ids(count, seed=f"{seed}-{session}-{turn}", vocab_size=vocab_size)
        if turn:
            return own
        return random_ids(self.system_tokens, seed=f"{seed}-system", vocab_size=vocab_size) + own


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("single", 1, 10, 128, 256),
        Workload("long", 1, 9, 32, 32, first_tokens=30_000),
        Workload("long-1k", 1, 9, 32, 32, first_tokens=1_000),
        Workload("chat64", 64, 6, 128, 128, system_tokens=1_024),
        Workload("chat256", 256, 4, 128, 128, system_tokens=1_024),
        Workload("deep16", 16, 8, 2_048, 64),
        Workload("returning", 192, 4, 512, 64, system_tokens=1_024, think_s=3.0),
    )
}


def random_ids(count: int, *, seed: str, vocab_size: int) -> list[int]:
    """Ordinary token ids, the same for the same seed."""
    return random.Random(seed).choices(range(min(FIRST_ORDINARY_TOKEN, vocab_size // 2), vocab_size), k=count)


def _scaled(count: int, factor: float) -> int:
    return max(1, round(count * factor))
