"""Arithmetic between tokens, bytes and pages of a token-major KV tensor.

Token `t` lies at bytes `[t*token_bytes, (t+1)*token_bytes)` of its session's range, page `p` at
`[p*page_bytes, (p+1)*page_bytes)`; neither size need divide the other. It knows no memory and no sessions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

KERNEL_BLOCK_TOKENS = 16


@dataclass(frozen=True)
class KVLayout:
    """Shape of one token's rows, `[num_layers, 2, num_kv_heads, head_dim]` of `dtype`, and the page they lie in.

    Raises ValueError when a size is not positive or a token's row would not be aligned to its dtype within a page.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_bytes: int

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "page_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        if self.page_bytes % self.dtype.itemsize:
            raise ValueError(f"page_bytes={self.page_bytes}: must be a multiple of {self.dtype.itemsize}, one number")

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token, all layers, keys and values."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def pages_for(self, num_tokens: int) -> int:
        """Pages that the first `num_tokens` tokens touch."""
        return -(-num_tokens * self.token_bytes // self.page_bytes)

    def complete_pages(self, num_tokens: int) -> int:
        """Pages every byte of which belongs to the first `num_tokens` tokens: what two sessions can share."""
        return num_tokens * self.token_bytes // self.page_bytes

    def complete_tokens(self, num_pages: int) -> int:
        """Tokens that lie wholly inside the first `num_pages` pages."""
        return num_pages * self.page_bytes // self.token_bytes

    def tokens_to_fill(self, num_pages: int) -> int:
        """The fewest tokens that make the first `num_pages` pages complete."""
        return -(-num_pages * self.page_bytes // self.token_bytes)

    def boundary_bytes(self, num_tokens: int) -> int:
        """Bytes of the first `num_tokens` tokens that lie in a page they do not complete."""
        return num_tokens * self.token_bytes % self.page_bytes

    def range_bytes(self, max_tokens: int, tile_tokens: int) -> int:
        """Address space of one session: its tokens and one kernel tile, in whole pages and whole kernel blocks."""
        unit = math.lcm(self.page_bytes, KERNEL_BLOCK_TOKENS * self.token_bytes)
        return -(-(max_tokens + tile_tokens) * self.token_bytes // unit) * unit
