"""What comes before attention, in plain torch: norms of query and key heads, then rotary position embedding.

It stands between a decoder layer and attention kinds that want rotated heads; the CUDA path has one kernel for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from chatserve.model.attention import AttentionStep, Span
from chatserve.model.config import ModelConfig
from chatserve.model.rope import rope_table, rotate, select_positions


class Attention(Protocol):
    """A kind of attention over rotated heads."""

    def plan(self, spans: Sequence[Span], rows: Tensor) -> AttentionStep:
        """See `CpuAttention.plan`."""
        ...


class RotatedAttention:
    """Plans steps for `Decoder` over an attention kind. `dtype` and `device` are the decoder's."""

    def __init__(self, attention: Attention, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self._attention = attention
        self._num_heads = config.num_heads
        self._num_rotated = config.num_heads + config.num_kv_heads
        self._eps = config.rms_norm_eps
        self._rope = rope_table(config, dtype=dtype, device=device)

    def plan(self, spans: Sequence[Span], rows: Tensor, positions: Tensor) -> RotatedStep:
        """See `CpuAttention.plan`; `positions` [n] int64 are the tokens' places in their sessions."""
        cos, sin = select_positions(self._rope, positions)
        step = self._attention.plan(spans, rows)
        return RotatedStep(step, cos, sin, num_heads=self._num_heads, num_rotated=self._num_rotated, eps=self._eps)


class RotatedStep:
    """See `chatserve.model.decoder.LayerAttention`."""

    def __init__(
        self, step: AttentionStep, cos: Tensor, sin: Tensor, *, num_heads: int, num_rotated: int, eps: float
    ) -> None:
        self._step = step
        self._cos = cos
        self._sin = sin
        self._num_heads = num_heads
        self._num_rotated = num_rotated
        self._eps = eps

    def run(self, layer: int, heads: Tensor, qk_norm: Tensor | None) -> Tensor:
        """Norm, rotate, attend."""
        qk, v = heads[:, : self._num_rotated], heads[:, self._num_rotated :]
        if qk_norm is not None:
            qk = rms_norm(qk, (qk.shape[-1],), None, self._eps).mul_(qk_norm)
        qk = rotate(qk, self._cos, self._sin)
        return self._step.run(layer, qk[:, : self._num_heads], qk[:, self._num_heads :], v)
