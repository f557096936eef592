"""When the readers of running requests are woken for new tokens: at once on a calm server, in turns on a busy one.

Waking a reader, and all that it sends then, costs much more than the tokens that it takes, so a front end with many
readers lets tokens gather. It knows neither tokens nor requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable

PER_READER_S = 0.0004
MAX_INTERVAL_S = 0.075
MIN_INTERVAL_S = 0.005  # below it gathering gains nothing
NUM_PHASES = 8  # readers take turns, so that not all of them work at the same moment


class Pacing:
    """Each reader is woken at most once in `interval_s`, which grows with their number, and in its own phase of it."""

    def __init__(self) -> None:
        self._phases: dict[Hashable, int] = {}
        self._due: list[dict[Hashable, Callable[[], None]]] = [{} for _ in range(NUM_PHASES)]
        self._phase = 0
        self._num_readers = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def interval_s(self) -> float:
        """Seconds between two wakings of one reader; 0 when nobody has to wait."""
        interval_s = min(len(self._phases) * PER_READER_S, MAX_INTERVAL_S)
        return interval_s if interval_s >= MIN_INTERVAL_S else 0.0

    def wake(self, reader: Hashable, wake: Callable[[], None]) -> None:
        """There is something for the reader: call `wake` now if it is its first time, else when its turn comes."""
        phase = self._phases.get(reader)
        if phase is None:
            self._phases[reader] = self._next_phase()
        if phase is None or not self.interval_s:
            wake()
            return
        self._due[phase][reader] = wake
        if self._timer is None:
            self._start_timer(asyncio.get_running_loop().time())

    def forget(self, reader: Hashable) -> None:
        """The reader has ended."""
        phase = self._phases.pop(reader, None)
        if phase is not None:
            self._due[phase].pop(reader, None)

    def _next_phase(self) -> int:
        """In turns, so that those who begin together do not all work at the same moment ever after."""
        self._num_readers += 1
        return self._num_readers % NUM_PHASES

    def _start_timer(self, last_s: float) -> None:
        """The next turn comes one phase behind the last one: what the last one's readers do does not put it off."""
        due_s = last_s + self.interval_s / NUM_PHASES
        self._timer = asyncio.get_running_loop().call_at(due_s, self._turn, due_s)

    def _turn(self, due_s: float) -> None:
        """It is the next phase's turn."""
        self._phase = (self._phase + 1) % NUM_PHASES
        due, self._due[self._phase] = self._due[self._phase], {}
        self._timer = None
        for wake in due.values():
            wake()
        if any(self._due):
            self._start_timer(max(due_s, asyncio.get_running_loop().time() - MAX_INTERVAL_S))
