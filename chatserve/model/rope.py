"""Rotary position embedding by table: built once per model, looked up once per step, applied in three operations.

It knows angles and shapes; the frequencies of a checkpoint come ready-made in the model's config.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chatserve.model.config import ModelConfig


def rope_table(config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Table [max_position, 2, head_dim]: cos, and sin with its first half negated, as `rotate` wants them.

    Computed in fp32 and scaled by the attention factor before it is cast, as transformers does.
    """
    inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32, device=device)
    angles = torch.arange(config.max_position, dtype=torch.float32, device=device)[:, None] * inv_freq
    cos, sin = angles.cos(), angles.sin()
    table = torch.cat((cos, cos, -sin, sin), dim=-1).view(config.max_position, 2, config.head_dim)
    return table.mul_(config.attention_factor).to(dtype)


def select_positions(table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and signed sin, each [n, 1, head_dim], of `positions` [n]. Every position must be below max_position."""
    cos, sin = table.index_select(0, positions).unsqueeze(2).unbind(1)
    return cos, sin


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `heads` [n, num_heads, head_dim] by position: the two halves of a head are the pairs' coordinates."""
    return (heads * cos).addcmul_(heads.roll(heads.shape[-1] // 2, dims=-1), sin)
