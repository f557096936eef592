"""How long text is merged before it is sent: hardly on a calm server, longer the more replies run.

What a message costs does not depend on the text in it, so merging is what keeps a busy front end responsive.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

PER_REPLY_S = 0.0002
MAX_INTERVAL_S = 0.1


class Pace:
    """One for all replies of a process; `counted` says that a reply runs.

    The interval between two messages of one reply grows by `PER_REPLY_S` for each, up to `MAX_INTERVAL_S`.
    """

    def __init__(self) -> None:
        self._num_running = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count a reply for as long as it is made."""
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1

    def interval_s(self, at_least_s: float = 0.0) -> float:
        """Seconds between two messages of one reply now."""
        return max(at_least_s, min(self._num_running * PER_REPLY_S, MAX_INTERVAL_S))
