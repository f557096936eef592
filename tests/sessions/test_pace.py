"""How long text is merged, by how many replies run."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from chatserve.sessions.pace import MAX_INTERVAL_S, Pace


@pytest.mark.parametrize(("replies", "interval_s"), [(1, 0.02), (100, 0.02), (200, 0.04), (5000, MAX_INTERVAL_S)])
def test_interval_by_replies(replies: int, interval_s: float) -> None:
    """A few replies keep the shortest interval, many lengthen it, up to a bound; those that ended do not count."""
    pace = Pace()
    with ExitStack() as running:
        for _ in range(replies):
            running.enter_context(pace.counted())
        assert pace.interval_s(0.02) == pytest.approx(interval_s)
    assert pace.interval_s(0.02) == 0.02
