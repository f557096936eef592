"""Attention over sessions whose keys and values lie at their places in one arena tensor.

A step is planned once and then run layer by layer: by the C++ kernel where there is one, else by torch's. It knows
rows of the arena, not sessions, pages or memory; rows outside the spans planned are never touched, because they may
not be mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from chatserve.model.native import NativeKernel, NativeStep, NativeUnavailable, kernel_for


@dataclass(frozen=True, slots=True)
class Span:
    """One session's part of a step: queries [query_start, query_start + num_queries) of the step's tokens.

    Its tokens' rows are [base_token, base_token + kv_length) of the arena, this step's included; the queries are
    the last `num_queries` of them.
    """

    query_start: int
    num_queries: int
    base_token: int
    kv_length: int


class AttentionStep(Protocol):
    """The attention of one step, planned for its spans."""

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write `k`, `v` [n, num_kv_heads, head_dim] to the arena and attend `q` [n, num_heads, head_dim] to it.

        Returns [n, num_heads, head_dim].
        """
        ...


@dataclass(frozen=True, slots=True)
class _PlannedSpan:
    """A span's history as views: per layer keys and values [num_kv_heads, 1, kv_length, head_dim].

    `mask` [num_queries, kv_length] is added to the scores; None for a single query, which sees all of them.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None


class CpuAttention:
    """Attention on the CPU with the faster of the two kinds that this machine and arena allow.

    `arena` is [arena_tokens, num_layers, 2, num_kv_heads, head_dim] with any strides, contiguous in head_dim.
    `attention_name` says which kind is in use, and why it is not the C++ kernel.
    """

    def __init__(self, arena: Tensor) -> None:
        self._kind: NativeAttention | SdpaAttention
        try:
            self._kind = NativeAttention(arena, kernel_for(arena))
            self.attention_name = self._kind.kernel.name
        except NativeUnavailable as reason:
            self._kind = SdpaAttention(arena)
            self.attention_name = f"{SdpaAttention.attention_name} ({reason})"

    def plan(self, spans: Sequence[Span], rows: Tensor) -> AttentionStep:
        """Prepare one step. `rows` [n] int64 are the arena rows of the step's tokens, in the order of the spans.

        Raises `ValueError` if the spans do not follow each other from query 0 to n.
        """
        return self._kind.plan(spans, rows)


class NativeAttention:
    """Attention with the C++ kernel: one call for all spans of a layer."""

    def __init__(self, arena: Tensor, kernel: NativeKernel) -> None:
        self.kernel = kernel
        self._arena = arena

    def plan(self, spans: Sequence[Span], rows: Tensor) -> AttentionStep:
        """See `CpuAttention.plan`. The kernel derives the rows from the spans."""
        _check_spans(spans, rows)
        flat = [(span.query_start, span.num_queries, span.base_token, span.kv_length) for span in spans]
        return NativeStep(self.kernel, self._arena, flat)


class SdpaAttention:
    """Attention with torch's kernels, a call per span, straight on strided views: no history is ever copied."""

    attention_name = "torch SDPA"

    def __init__(self, arena: Tensor) -> None:
        self._arena = arena
        self._sides = [layer.unbind(1) for layer in arena.unbind(1)]

    def plan(self, spans: Sequence[Span], rows: Tensor) -> AttentionStep:
        """See `CpuAttention.plan`."""
        _check_spans(spans, rows)
        masks: dict[tuple[int, int], Tensor | None] = {}
        for span in spans:
            shape = (span.num_queries, span.kv_length)
            if shape not in masks:
                masks[shape] = _causal_mask(*shape, self._arena)
        planned = [self._plan_span(span, masks[span.num_queries, span.kv_length]) for span in spans]
        return _SdpaStep(self._sides, planned, [span.num_queries for span in spans], rows)

    def _plan_span(self, span: Span, mask: Tensor | None) -> _PlannedSpan:
        """All layers' views with one strided view and one unbind: less than half of what slicing each costs."""
        arena = self._arena
        _, num_layers, _, num_kv_heads, head_dim = arena.shape
        token, layer, side, head, element = arena.stride()
        views = arena.as_strided(
            (2, num_layers, num_kv_heads, 1, span.kv_length, head_dim),
            (side, layer, head, 0, token, element),
            arena.storage_offset() + span.base_token * token,
        )
        keys, values = views.unbind(0)
        return _PlannedSpan(keys.unbind(0), values.unbind(0), mask)


class _SdpaStep:
    """See `AttentionStep`."""

    def __init__(
        self, sides: Sequence[Sequence[Tensor]], planned: Sequence[_PlannedSpan], num_queries: list[int], rows: Tensor
    ) -> None:
        self._sides = sides
        self._planned = planned
        self._num_queries = num_queries
        self._rows = rows

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._sides[layer]
        keys.index_copy_(0, self._rows, k)
        values.index_copy_(0, self._rows, v)
        num_kv_heads = k.shape[1]
        # [n * num_kv_heads, 1, group, head_dim]: a single query's slice is then ready, its group as query rows.
        queries = q.reshape(-1, 1, q.shape[1] // num_kv_heads, q.shape[2])
        parts = torch.split(queries, [n * num_kv_heads for n in self._num_queries])
        outputs = [_attend(span, layer, part) for span, part in zip(self._planned, parts, strict=True)]
        return torch.cat(outputs).view(q.shape)


def _attend(span: _PlannedSpan, layer: int, queries: Tensor) -> Tensor:
    """Attend `queries` [num_queries * num_kv_heads, 1, group, head_dim] to the span's history; same shape back."""
    keys, values = span.keys[layer], span.values[layer]
    if span.mask is None:
        return scaled_dot_product_attention(queries, keys, values)
    num_kv_heads, group = keys.shape[0], queries.shape[2]
    by_head = queries.view(-1, num_kv_heads, group, queries.shape[3]).permute(1, 2, 0, 3)
    # Expanding with stride 0 shares each key head among its group; torch's own enable_gqa is twice as slow.
    expanded = (num_kv_heads, group, *keys.shape[2:])
    output = scaled_dot_product_attention(by_head, keys.expand(expanded), values.expand(expanded), span.mask)
    return output.permute(2, 0, 1, 3).reshape(queries.shape)


def _causal_mask(num_queries: int, kv_length: int, like: Tensor) -> Tensor | None:
    """Additive mask [num_queries, kv_length]: query i sees keys up to kv_length - num_queries + i."""
    if num_queries == 1:
        return None
    mask = torch.full((num_queries, kv_length), float("-inf"), dtype=like.dtype, device=like.device)
    return mask.triu_(kv_length - num_queries + 1)


def _check_spans(spans: Sequence[Span], rows: Tensor) -> None:
    expected_start = 0
    for span in spans:
        if span.query_start != expected_start or not 0 < span.num_queries <= span.kv_length:
            raise ValueError(f"{span} cannot follow {expected_start} planned queries; list spans in query order")
        expected_start += span.num_queries
    if expected_start != rows.shape[0]:
        raise ValueError(f"spans hold {expected_start} queries for {rows.shape[0]} rows; one row per query is needed")
