"""The C++ attention: what it computes, on which bits its results depend, and how it is compiled, cached and refused."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chatserve.model import native
from chatserve.model.attention import CpuAttention, SdpaAttention, Span
from chatserve.model.native import NativeKernel, NativeUnavailable, load_kernel
from tests.model.oracle import native_attention

RANGE = 1200
needs_compiler = pytest.mark.skipif(isinstance(load_kernel(), NativeUnavailable), reason="no working C++ compiler")


class Step:
    """Random sessions in an arena of NaN: `histories` are (past tokens, queries), a range of the arena each."""

    def __init__(
        self, histories: Sequence[tuple[int, int]], kv_heads: int, group: int, head_dim: int, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_queries = sum(queries for _, queries in histories)
        self.arena = torch.full((RANGE * len(histories), 2, 2, kv_heads, head_dim), float("nan"))
        self.q = torch.randn(num_queries, kv_heads * group, head_dim, generator=generator) * 2
        self.k, self.v = torch.randn(2, num_queries, kv_heads, head_dim, generator=generator) * 2
        self.spans: list[Span] = []
        start = 0
        for index, (past, queries) in enumerate(histories):
            base = RANGE * index + index % 3
            self.arena[base : base + past] = torch.randn(past, 2, 2, kv_heads, head_dim, generator=generator)
            self.spans.append(Span(start, queries, base, past + queries))
            start += queries

    def run(self, spans: Sequence[Span] | None = None) -> Tensor:
        """Outputs of the queries of `spans`, all of them unless said, in layer 1."""
        spans = self.spans if spans is None else spans
        chosen = torch.cat([torch.arange(s.query_start, s.query_start + s.num_queries) for s in spans])
        rows = torch.cat([torch.arange(s.kv_length - s.num_queries, s.kv_length) + s.base_token for s in spans])
        moved, start = [], 0
        for span in spans:
            moved.append(Span(start, span.num_queries, span.base_token, span.kv_length))
            start += span.num_queries
        step = native_attention(self.arena).plan(moved, rows)
        return step.run(1, self.q[chosen], self.k[chosen], self.v[chosen])

    def expected(self) -> Tensor:
        """The same in float64, plainly; call it after `run`, which writes the keys and values."""
        return torch.cat([self._expected(span) for span in self.spans])

    def _expected(self, span: Span) -> Tensor:
        q = self.q[span.query_start : span.query_start + span.num_queries].double()
        history = self.arena[span.base_token : span.base_token + span.kv_length, 1].double()
        keys, values = history.repeat_interleave(q.shape[1] // history.shape[2], dim=2).unbind(1)
        scores = torch.einsum("qhd,thd->hqt", q, keys) / q.shape[2] ** 0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(span.kv_length - span.num_queries + 1)
        return torch.einsum("hqt,thd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(2), values)


histories = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 40), st.sampled_from([255, 256, 257, 511, 512, 1000])),
        st.sampled_from([1, 1, 1, 2, 7, 16, 17, 33, 70]),
    ),
    min_size=1,
    max_size=5,
)


@needs_compiler
@given(
    histories=histories,
    heads=st.sampled_from([(1, 1), (2, 2), (2, 1), (1, 4), (2, 4), (1, 8), (2, 3), (1, 12)]),
    head_dim=st.sampled_from([8, 16, 24, 64, 80, 128]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_any_step_equals_float64_attention(
    histories: list[tuple[int, int]], heads: tuple[int, int], head_dim: int, seed: int
) -> None:
    """Decodes and chunks, any history, grouping and head size: within 1e-5, and no row outside the spans is used."""
    step = Step(histories, *heads, head_dim, seed)
    output, expected = step.run(), step.expected()
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()
    written = ~step.arena[:, 1].isnan().flatten(1).any(dim=1)
    lengths = {s.base_token: s.kv_length for s in step.spans}
    assert written.sum() == sum(lengths.values())


@needs_compiler
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_a_session_alone_and_in_a_batch_has_the_same_bits(num_threads: int, head_dim: int) -> None:
    """Other sessions in the step and the number of threads change no bit of a session's output."""
    step = Step([(900, 1), (30, 20), (1000, 1), (0, 1), (700, 50), (255, 1)], 2, 2, head_dim, seed=3)
    alone = [step.run([span]) for span in step.spans]
    torch.set_num_threads(num_threads)
    try:
        together = [step.run(), torch.cat([step.run(step.spans[:2]), step.run(step.spans[2:])])]
    finally:
        torch.set_num_threads(1)
    for output in together:
        assert torch.equal(output, torch.cat(alone))


@needs_compiler
def test_a_chunk_cut_in_two_has_the_same_bits() -> None:
    """A query's output does not depend on which other queries of its session are in its step."""
    whole = Step([(300, 60)], 2, 2, 64, seed=5)
    output = whole.run()
    span = whole.spans[0]
    parts = [Span(0, 25, span.base_token, 325), Span(25, 35, span.base_token, 360)]
    assert torch.equal(output, torch.cat([whole.run([part]) for part in parts]))


@needs_compiler
def test_not_a_number_within_the_history_shows() -> None:
    """A broken row that a query does see is not hidden by the fast arithmetic."""
    for num_queries in (1, 9):
        step = Step([(50, num_queries), (50, num_queries)], 2, 2, 64, seed=1)
        step.arena[20, 1, 0, 1, 5] = float("nan")
        output = step.run()
        assert output[:num_queries, 2:].isnan().all()
        assert output[:num_queries, :2].isfinite().all()
        assert output[num_queries:].isfinite().all()


@needs_compiler
def test_scores_far_apart_stay_exact() -> None:
    """Weights that underflow vanish, and large scores do not overflow."""
    for num_queries in (1, 9):
        step = Step([(400, num_queries)], 2, 2, 64, seed=2)
        step.q *= 100
        output, expected = step.run(), step.expected()
        assert (output - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_other_dtypes_and_head_sizes_run_on_torch() -> None:
    """An arena that the kernel does not take gets torch's kernels, and the name says why."""
    for arena, why in (
        (torch.zeros(4, 1, 2, 1, 16, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(4, 1, 2, 1, 12), "head_dim"),
        (torch.zeros(4, 1, 2, 1, 512), "head_dim"),
    ):
        name = CpuAttention(arena).attention_name
        assert name.startswith("torch SDPA (")
        assert why in name


def test_self_test_refuses_a_kernel_that_computes_wrongly() -> None:
    """A library whose output is not attention is refused before use."""

    class Zeros:
        def chatserve_scratch_floats(self, *_: Any) -> int:
            return 0

        def chatserve_attend(self, *arguments: Any) -> None:
            ctypes.memset(arguments[11], 0, 1024)

    with pytest.raises(NativeUnavailable, match="wrong attention"):
        native._check(NativeKernel(cast(ctypes.CDLL, Zeros()), None, "zeros"))


REPORT_SCRIPT = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
from chatserve.model.attention import CpuAttention, Span
torch.set_num_threads(2)
attention = CpuAttention(torch.zeros(4096, 1, 2, 2, 64))
print("NAME", attention.attention_name)
step = attention.plan([Span(0, 8, 0, 4096)], torch.arange(4088, 4096))
assert step.run(0, *torch.ones(3, 8, 2, 64).unbind(0)).isfinite().all()
torch.ones(512, 512) @ torch.ones(512, 512)
print("OPENMP", *{line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]})
"""


def report(**environment: str) -> subprocess.Popen[str]:
    """A fresh process that prints its log, the attention in use and its OpenMP runtimes."""
    inherited = {name: value for name, value in os.environ.items() if name != "CXX"}
    command = [sys.executable, "-c", REPORT_SCRIPT]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**inherited, **environment})


def test_without_a_compiler_torch_attends_and_one_log_line_says_so(tmp_path: Path) -> None:
    """With an empty PATH the same call works on torch's kernels, names them and the remedy."""
    output = report(PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache")).communicate()[0]
    assert "NAME torch SDPA (no C++ compiler on PATH; install g++ or clang++, or set CXX)" in output
    assert output.count("WARNING attention runs on torch's kernels") == 1


def test_a_failing_compiler_is_quoted(tmp_path: Path) -> None:
    """What the compiler said is in the reason, and nothing half-made stays in the cache."""
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit\necho "out of luck" >&2; exit 1\n')
    compiler.chmod(0o755)
    output = report(PATH="", CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path / "cache")).communicate()[0]
    assert "NAME torch SDPA (" in output
    assert "out of luck" in output
    assert list((tmp_path / "cache" / "chatserve" / "native").iterdir()) == []


@needs_compiler
def test_two_processes_compile_at_once_into_a_private_cache(tmp_path: Path) -> None:
    """Both use the kernel over torch's own OpenMP runtime; one library is left, in a directory that is ours alone."""
    processes = [report(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    for output in [process.communicate()[0] for process in processes]:
        assert "NAME C++ kernel (" in output
        assert "one thread" not in output
        assert len(output.partition("OPENMP ")[2].split()) == 1
    directory = tmp_path / "chatserve" / "native"
    assert len(list(directory.iterdir())) == 1
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_cache_that_others_can_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library is never loaded from a directory where someone else could have put it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = native.cache_directory()
    directory.chmod(0o777)
    with pytest.raises(NativeUnavailable, match="writable by you alone"):
        native.cache_directory()


@needs_compiler
def test_both_kinds_agree_through_the_public_class() -> None:
    """`CpuAttention` uses the kernel where it can, and torch's kernels give the same to rounding."""
    step = Step([(40, 1), (3, 12)], 2, 2, 64, seed=9)
    output = step.run()
    attention = CpuAttention(step.arena)
    assert attention.attention_name.startswith("C++ kernel (")
    rows = torch.cat([torch.arange(s.kv_length - s.num_queries, s.kv_length) + s.base_token for s in step.spans])
    for kind in (attention, SdpaAttention(step.arena)):
        other = kind.plan(step.spans, rows).run(1, step.q, step.k, step.v)
        torch.testing.assert_close(other, output, rtol=1e-5, atol=1e-5)
