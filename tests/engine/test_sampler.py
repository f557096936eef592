"""Sampling: filters, distribution, and draws that depend on seed and position alone."""

from __future__ import annotations

import pytest
import torch

from chatserve.engine.api import SamplingParams
from chatserve.engine.sampler import sample, uniform

LOGITS = torch.tensor([[1.0, 3.0, 2.0, 0.0]])


def draw_many(params: dict[str, float], count: int = 4000) -> list[int]:
    """Tokens drawn at `count` positions with one seed."""
    rows = [SamplingParams(seed=7, **params)] * count
    return sample(LOGITS.expand(count, -1), rows, range(count))


def test_greedy_takes_the_largest():
    """Temperature 0 is the arg-max."""
    assert sample(LOGITS, [SamplingParams()], [0]) == [1]


def test_draws_follow_the_distribution():
    """At temperature 1 the frequencies are the softmax's."""
    tokens = torch.tensor(draw_many({"temperature": 1.0}, 20000))
    frequencies = torch.bincount(tokens, minlength=4) / len(tokens)
    torch.testing.assert_close(frequencies, torch.softmax(LOGITS[0], -1), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.6}, {1}),
        ({"top_p": 0.7}, {1, 2}),
        ({"min_p": 0.3}, {1, 2}),
    ],
)
def test_filters_leave_only_the_allowed(params, allowed):
    """top-k, top-p and min-p leave exactly the tokens their definitions name."""
    assert set(draw_many({"temperature": 1.0} | params)) == allowed


def test_draw_depends_on_seed_and_position_only():
    """The same row at another place of another batch draws the same token."""
    params = SamplingParams(temperature=1.5, seed=3)
    alone = sample(LOGITS, [params], [41])
    others = [SamplingParams(), params, SamplingParams(temperature=1.0, seed=9)]
    batch = sample(LOGITS.expand(3, -1), others, [5, 41, 6])
    assert batch[1:2] == alone


def test_uniform_differs_by_seed_and_position():
    """Neighbouring seeds and positions give unrelated numbers in [0, 1)."""
    numbers = {uniform(seed, position) for seed in range(30) for position in range(30)}
    assert len(numbers) == 900
    assert all(0 <= number < 1 for number in numbers)
