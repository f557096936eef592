"""FlashInfer's attention on sessions whose histories lie in one arena. The only importer of flashinfer.

Contiguous addresses let the FA3 kernel read a history as one ragged tensor; the paged kernels read the same memory as
blocks of 16 tokens whose numbers count up from the session's base. It knows rows and spans, not sessions or leases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flashinfer import (
    BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
)
from flashinfer.activation import silu_and_mul
from flashinfer.norm import rmsnorm
from flashinfer.sampling import top_k_renorm_probs, top_p_renorm_probs
from torch import Tensor

from chatserve.model.attention import Span
from chatserve.model.spans import BLOCK_TOKENS, DecodePlan, block_counts

__all__ = ["DecodeKernel", "FlashKernels", "rmsnorm", "silu_and_mul", "top_k_renorm_probs", "top_p_renorm_probs"]

WORKSPACE_BYTES = 384 << 20
HOPPER = 9  # the compute capability whose chips the FA3 kernels are for


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Query heads, key/value heads and their size."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class FlashKernels:
    """The kernels over one arena [arena_tokens, num_layers, 2, num_kv_heads, head_dim] of bf16 or fp16.

    One float workspace serves them all, because kernels of one stream follow each other.
    """

    def __init__(self, arena: Tensor, num_heads: int) -> None:
        _, _, _, num_kv_heads, head_dim = arena.shape
        self.shape = HeadShape(num_heads, num_kv_heads, head_dim)
        self.dtype = arena.dtype
        self.has_fa3 = torch.cuda.get_device_capability(arena.device)[0] == HOPPER
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=arena.device)
        self.blocks = _views(arena, BLOCK_TOKENS)
        self._rows = _views(arena, 1)
        self._paged = BatchPrefillWithPagedKVCacheWrapper(self.workspace, "NHD", backend="fa2")
        self._ragged = BatchPrefillWithRaggedKVCacheWrapper(
            self.workspace, "NHD", backend="fa3" if self.has_fa3 else "fa2"
        )

    @property
    def name(self) -> str:
        """For the operator."""
        prefill = "FA3 ragged and FA2 paged" if self.has_fa3 else "FA2 paged"
        return f"FlashInfer ({prefill} prefill, tensor-core decode)"

    def plan_paged(self, spans: Sequence[Span], block_indices: Tensor) -> None:
        """Plan the paged kernel: it splits long histories over the chip. `block_indices` int32, on the device."""
        counts = block_counts([span.kv_length for span in spans])
        lengths = torch.tensor([span.kv_length for span in spans], dtype=torch.int32)
        self._paged.plan(
            _indptr([span.num_queries for span in spans]), _indptr(counts), block_indices,
            (lengths - 1) % BLOCK_TOKENS + 1,
            self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim, BLOCK_TOKENS,
            causal=True, q_data_type=self.dtype, kv_data_type=self.dtype, seq_lens=lengths,
        )  # fmt: skip

    def run_paged(self, layer: int, q: Tensor, out: Tensor) -> None:
        """Attend the planned spans' queries."""
        self._paged.run(q, self.blocks[layer], out=out)

    def plan_ragged(self, spans: Sequence[Span]) -> None:
        """Plan the FA3 kernel for spans in order of their bases; between two lies an entry without queries."""
        query_ends, row_ends = [0], [spans[0].base_token]
        for span in spans:
            if span.base_token > row_ends[-1]:
                query_ends.append(query_ends[-1])
                row_ends.append(span.base_token)
            query_ends.append(query_ends[-1] + span.num_queries)
            row_ends.append(span.base_token + span.kv_length)
        self._ragged.plan(
            torch.tensor(query_ends, dtype=torch.int32), torch.tensor(row_ends, dtype=torch.int32),
            self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim,
            causal=True, q_data_type=self.dtype, kv_data_type=self.dtype,
        )  # fmt: skip

    def run_ragged(self, layer: int, q: Tensor, out: Tensor) -> None:
        """Attend the planned spans' queries. Reads whole tiles: rows behind a history's end must be mapped, finite."""
        keys, values = self._rows[layer]
        self._ragged.run(q, keys.squeeze(1), values.squeeze(1), out=out)


class DecodeKernel:
    """Tensor-core decoding of one batch size, planned anew for each step; in a CUDA graph where buffers are given.

    `block_indices` [enough for every step] int32 on the device is filled by the caller before the kernel runs.
    """

    def __init__(self, flash: FlashKernels, block_indices: Tensor, *, graph_batch: int | None = None) -> None:
        self._flash = flash
        self._block_indices = block_indices
        buffers: dict[str, Any] = {}
        if graph_batch is not None:
            buffers = {
                "use_cuda_graph": True,
                "paged_kv_indptr_buffer": block_indices.new_zeros(graph_batch + 1),
                "paged_kv_indices_buffer": block_indices,
                "paged_kv_last_page_len_buffer": block_indices.new_ones(graph_batch),
            }
        self._wrapper = BatchDecodeWithPagedKVCacheWrapper(flash.workspace, "NHD", use_tensor_cores=True, **buffers)

    def plan(self, plan: DecodePlan) -> None:
        """Split the step's histories over the chip; on the host, with small copies queued behind the step before."""
        shape, dtype = self._flash.shape, self._flash.dtype
        self._wrapper.plan(
            plan.indptr, self._block_indices[: plan.num_blocks], plan.last_lengths,
            shape.num_heads, shape.num_kv_heads, shape.head_dim, BLOCK_TOKENS,
            q_data_type=dtype, kv_data_type=dtype, seq_lens=plan.lengths,
        )  # fmt: skip

    def run(self, layer: int, q: Tensor, out: Tensor) -> None:
        """Attend one query a session."""
        self._wrapper.run(q, self._flash.blocks[layer], out=out)


def _views(arena: Tensor, block_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """A layer's keys and values as [arena_tokens / block_tokens, block_tokens, num_kv_heads, head_dim]."""
    num_tokens, num_layers, _, num_kv_heads, head_dim = arena.shape
    token, layer_stride, side, head, element = arena.stride()
    shape = (num_tokens // block_tokens, block_tokens, num_kv_heads, head_dim)
    strides = (block_tokens * token, token, head, element)
    starts = [arena.storage_offset() + layer * layer_stride for layer in range(num_layers)]
    return [(arena.as_strided(shape, strides, at), arena.as_strided(shape, strides, at + side)) for at in starts]


def _indptr(counts: Sequence[int]) -> Tensor:
    ends = torch.zeros(len(counts) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(counts), 0, out=ends[1:])
    return ends
