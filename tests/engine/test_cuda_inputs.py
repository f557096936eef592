"""The sizes that a GPU's steps are padded to: few, close enough, and never beyond the limits."""

from __future__ import annotations

import pytest

from chatserve.engine.cuda_inputs import CAPTURED_SIZES, graph_batches, padded, step_sizes


@pytest.mark.parametrize("most", [1, 5, 16, 100, 256, 1000, 1024, 1025, 2048, 3000, 8192, 16_384])
def test_ladders_end_at_the_limit_and_rise(most: int) -> None:
    """Every count up to the limit has a size, none is beyond it, and none comes twice."""
    for ladder in (step_sizes(most), graph_batches(most)):
        assert ladder[-1] == most
        assert ladder == sorted(set(ladder))
        assert all(count <= padded(count, ladder) <= most for count in range(1, most + 1))


def test_large_steps_are_padded_by_an_eighth_at_most() -> None:
    """Padding costs as much as tokens; trying sizes costs time at the start."""
    ladder = step_sizes(16_384)
    assert len(ladder) < 60
    for count in range(CAPTURED_SIZES[-1], 16_384, 7):
        assert padded(count, ladder) <= count * 9 / 8
