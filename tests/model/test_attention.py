"""Attention on arena rows against a plain implementation, and what it must never touch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chatserve.model.attention import Span
from tests.model.oracle import KINDS

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 8


def strided_arena(num_tokens: int) -> Tensor:
    """An arena of NaN that starts inside a larger storage and whose tokens lie further apart than their rows."""
    shape = (num_tokens, LAYERS, 2, KV_HEADS, HEAD_DIM)
    row = LAYERS * 2 * KV_HEADS * HEAD_DIM + 24
    storage = torch.full((num_tokens * row + 40,), float("nan"))
    strides = (row, 2 * KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, HEAD_DIM, 1)
    return storage.as_strided(shape, strides, 40)


def plain_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention, token by token and head by head; the queries are the last tokens of the history."""
    num_queries, num_heads, head_dim = q.shape
    group = num_heads // keys.shape[1]
    output = torch.empty_like(q)
    for query in range(num_queries):
        seen = keys.shape[0] - num_queries + query + 1
        for head in range(num_heads):
            scores = keys[:seen, head // group] @ q[query, head] / head_dim**0.5
            output[query, head] = scores.softmax(0) @ values[:seen, head // group]
    return output


@given(
    sessions=st.lists(st.tuples(st.integers(0, 20), st.sampled_from([1, 1, 2, 9])), min_size=1, max_size=5),
    group=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_spans_equal_plain_attention(
    attention_kind: str, sessions: list[tuple[int, int]], group: int, seed: int
) -> None:
    """Every span of a mixed step attends to exactly its own history, whatever its length and query count."""
    generator = torch.Generator().manual_seed(seed)
    arena = strided_arena(40 * len(sessions))
    num_tokens = sum(num_queries for _, num_queries in sessions)
    q = torch.randn(num_tokens, KV_HEADS * group, HEAD_DIM, generator=generator)
    k, v = torch.randn(2, num_tokens, KV_HEADS, HEAD_DIM, generator=generator)
    spans: list[Span] = []
    rows: list[int] = []
    start = 0
    for index, (past, num_queries) in enumerate(sessions):
        base = 40 * index + 3
        arena[base : base + past] = torch.randn(past, *arena.shape[1:], generator=generator)
        spans.append(Span(start, num_queries, base, past + num_queries))
        rows += range(base + past, base + past + num_queries)
        start += num_queries
    step = KINDS[attention_kind](arena).plan(spans, torch.tensor(rows))
    for layer in range(LAYERS):
        output = step.run(layer, q, k, v)
        for span in spans:
            queries = slice(span.query_start, span.query_start + span.num_queries)
            history = arena[span.base_token : span.base_token + span.kv_length, layer]
            assert torch.equal(history[-span.num_queries :, 0], k[queries])
            assert torch.equal(history[-span.num_queries :, 1], v[queries])
            torch.testing.assert_close(output[queries], plain_attention(q[queries], history[:, 0], history[:, 1]))


def test_queries_may_be_views_of_a_larger_tensor(attention_kind: str) -> None:
    """Queries, keys and values that are slices of one fused tensor give the same output as copies of them."""
    fused = torch.randn(5, 8, HEAD_DIM)
    spans = [Span(0, 4, 0, 4), Span(4, 1, 10, 1)]
    rows = torch.tensor([0, 1, 2, 3, 10])
    views = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    output = KINDS[attention_kind](strided_arena(20)).plan(spans, rows).run(0, *views)
    copies = [view.clone(memory_format=torch.contiguous_format) for view in views]
    assert torch.equal(output, KINDS[attention_kind](strided_arena(20)).plan(spans, rows).run(0, *copies))


@pytest.mark.parametrize(
    "spans",
    [
        [Span(0, 1, 0, 1)],
        [Span(0, 1, 0, 1), Span(2, 1, 8, 1)],
        [Span(1, 1, 8, 1), Span(0, 1, 0, 1)],
        [Span(0, 2, 0, 1)],
        [Span(0, 0, 0, 4), Span(0, 2, 8, 4)],
    ],
    ids=["too few", "gap", "wrong order", "more queries than history", "no queries"],
)
def test_plan_refuses_spans_that_do_not_cover_the_step(attention_kind: str, spans: list[Span]) -> None:
    """Spans that leave out, repeat or invent queries raise before anything is written."""
    arena = strided_arena(20)
    with pytest.raises(ValueError, match="span"):
        KINDS[attention_kind](arena).plan(spans, torch.tensor([0, 8]))
    assert arena.isnan().all()


OVERREAD_SCRIPT = """
import ctypes, mmap, sys, torch
from chatserve.model.attention import Span
from tests.model.oracle import KINDS

libc = ctypes.CDLL(None, use_errno=True)
page, layers, kv_heads, head_dim = mmap.PAGESIZE, 2, 2, 16
row_bytes = layers * 2 * kv_heads * head_dim * 4
memory = mmap.mmap(-1, 64 * page)
arena = torch.frombuffer(memory, dtype=torch.float32).view(-1, layers, 2, kv_heads, head_dim)
rows_per_page = page // row_bytes
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
for first, last in ((0, 8), (24, 40), (56, 64)):  # readable pages: [8, 24) and [40, 56)
    assert libc.mprotect(arena.data_ptr() + first * page, (last - first) * page, 0) == 0  # PROT_NONE

def run(q_counts):
    spans, rows, start = [], [], 0
    for base_page, count in zip((8, 40), q_counts):
        base, length = base_page * rows_per_page, 16 * rows_per_page
        spans.append(Span(start, count, base, length))
        rows += range(base + length - count, base + length)
        start += count
    k, v = torch.ones(2, start, kv_heads, head_dim)
    step = KINDS[sys.argv[1]](arena).plan(spans, torch.tensor(rows))
    return step.run(1, torch.ones(start, 4, head_dim), k, v)

for q_counts in ((1, 1), (1, 7), (40, 1), (100, 33)):
    assert run(q_counts).isfinite().all()
print("ran")
"""


def test_rows_outside_the_spans_are_never_read(attention_kind: str) -> None:
    """Histories that fill their mapped pages exactly, between unmapped ones, run without a fault."""
    done = subprocess.run(
        [sys.executable, "-c", OVERREAD_SCRIPT, attention_kind], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
