"""How a step's spans are given to kernels: blocks of histories, and which kernel prefills what."""

from __future__ import annotations

import numpy as np
import pytest

from chatserve.model.spans import BLOCK_TOKENS, block_counts, count_tiles, decode_plan, prefers_ragged


def test_blocks_cover_histories_exactly():
    """A history's last block may be full or hold one row; blocks and last lengths add up to its length."""
    lengths = [1, 15, 16, 17, 4096]
    plan = decode_plan(np.array(lengths, np.int32))
    assert np.diff(plan.indptr.numpy()).tolist() == block_counts(lengths) == [1, 1, 1, 2, 256]
    assert plan.last_lengths.tolist() == [1, 15, 16, 1, 16]
    assert plan.num_blocks == 261
    assert ((np.diff(plan.indptr.numpy()) - 1) * BLOCK_TOKENS + plan.last_lengths.numpy()).tolist() == lengths


def test_no_decodes_make_an_empty_plan():
    """A step of prefills only reads no blocks for decoding."""
    assert decode_plan(np.zeros(0, np.int32)).num_blocks == 0


@pytest.mark.parametrize(
    ("num_queries", "history", "num_spans", "ragged"),
    [
        (32, 30_000, 1, False),
        (32, 30_000, 16, False),
        (128, 30_000, 1, False),
        (256, 30_000, 1, True),
        (128, 30_000, 4, True),
        (4096, 32_768, 1, True),
        (2048, 0, 1, True),
        (128, 1024, 1, True),
        (16, 0, 64, False),
    ],
)
def test_kernels_that_split_histories_take_what_would_leave_the_chip_idle(num_queries, history, num_spans, ragged):
    """Llama-3-8B's heads on 132 processors: the faster one, measured by `bench/attention_kernels.py`."""
    num_tiles = num_spans * count_tiles(num_queries, num_heads=32)
    assert prefers_ragged(num_queries, history, num_tiles=num_tiles, num_processors=132) is ragged
