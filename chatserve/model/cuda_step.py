"""One step's attention on a GPU: rotate and store with one kernel, then up to three kinds of attention over the arena.

Tokens stand in the order decodes, paged prefills, ragged prefills, so that each kind gets a slice of the queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chatserve.model.config import ModelConfig
from chatserve.model.cuda_kernels import build_rope, rotate_and_store
from chatserve.model.flash import DecodeKernel, FlashKernels


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of a step by the kernel that attends them."""

    decode: int
    paged: int = 0
    ragged: int = 0


class CudaLayers:
    """What every step needs of model and arena: the rope table and each layer's rows."""

    def __init__(self, config: ModelConfig, arena: Tensor) -> None:
        self._num_heads = config.num_heads
        self._eps = config.rms_norm_eps
        self._rope = build_rope(config, arena.device)
        self._layers: Sequence[Tensor] = arena.unbind(1)
        self.last = config.num_layers - 1

    def rotate_and_store(
        self,
        layer: int,
        heads: Tensor,
        qk_norm: Tensor | None,
        positions: Tensor,
        rows: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """Queries [n, num_heads, head_dim]; keys and values go to the arena's `rows` [n], unless negative."""
        return rotate_and_store(
            heads, qk_norm, self._eps, self._rope, positions, rows, self._layers[layer], self._num_heads, out=out
        )


class CudaStep:
    """See `chatserve.model.decoder.LayerAttention`. The kernels were planned for `counts`.

    `positions` and `rows` are int32 [n] on the device.
    """

    def __init__(
        self,
        layers: CudaLayers,
        flash: FlashKernels,
        decode: DecodeKernel,
        counts: TokenCounts,
        positions: Tensor,
        rows: Tensor,
    ) -> None:
        self._layers = layers
        self._flash = flash
        self._decode = decode
        self._counts = counts
        self._positions = positions
        self._rows = rows

    def run(self, layer: int, heads: Tensor, qk_norm: Tensor | None) -> Tensor:
        """See `LayerAttention.run`."""
        q = self._layers.rotate_and_store(layer, heads, qk_norm, self._positions, self._rows)
        out = torch.empty_like(q)
        self.attend(layer, q, out)
        return out

    def attend(self, layer: int, q: Tensor, out: Tensor) -> None:
        """Attend rotated queries [n, num_heads, head_dim], whose keys and values are stored, into `out`."""
        counts = self._counts
        end = counts.decode + counts.paged
        if counts.decode:
            self._decode.run(layer, q[: counts.decode], out[: counts.decode])
        if counts.paged:
            self._flash.run_paged(layer, q[counts.decode : end], out[counts.decode : end])
        if counts.ragged:
            self._flash.run_ragged(layer, q[end : end + counts.ragged], out[end : end + counts.ragged])
