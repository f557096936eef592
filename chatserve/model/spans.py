"""How a step's spans are given to kernels: which kernel prefills which span, and the blocks that decodes read.

Plain arithmetic on the host, without kernels, so that the choice is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BLOCK_TOKENS = 16  # the paged kernels' own unit; nothing to do with the size of a page
TILE_TOKENS = 128  # rows that the FA3 kernel reads at a time, and queries it takes at a time
SHORT_HISTORY_TOKENS = 1024
FILLED_SHARE = 0.95  # of the processors with a tile, from which splitting gains nothing


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """What a decode kernel is planned with, on the host: `indptr` [n + 1], `lengths` and `last_lengths` [n], int32."""

    indptr: Tensor
    lengths: Tensor
    last_lengths: Tensor

    @property
    def num_blocks(self) -> int:
        """Blocks that the step reads."""
        return int(self.indptr[-1])


def block_counts(kv_lengths: Sequence[int]) -> list[int]:
    """Blocks that histories of these lengths touch."""
    return [-(-length // BLOCK_TOKENS) for length in kv_lengths]


def decode_plan(kv_lengths: npt.NDArray[np.int32]) -> DecodePlan:
    """The plan of one query a session, `kv_lengths` [n] with this step's row counted."""
    indptr = np.zeros(len(kv_lengths) + 1, np.int32)
    np.cumsum(-(-kv_lengths // BLOCK_TOKENS), out=indptr[1:])
    last_lengths = (kv_lengths - 1) % BLOCK_TOKENS + 1
    return DecodePlan(torch.from_numpy(indptr), torch.from_numpy(kv_lengths), torch.from_numpy(last_lengths))


def count_tiles(num_queries: int, num_heads: int) -> int:
    """Pieces that the FA3 kernel makes of a span: 128 queries of one head, with the whole history, are one."""
    return -(-num_queries // TILE_TOKENS) * num_heads


def prefers_ragged(num_queries: int, history: int, *, num_tiles: int, num_processors: int) -> bool:
    """Whether the FA3 kernel is the faster one for a span, in a step whose prefills have `num_tiles` tiles.

    It does not split a history, so few tiles leave much of the chip idle where the FA2 paged kernel splits; and a tile
    is always 128 queries, so few new tokens waste it. Measured on an H200 with 32 query heads: FA3 takes 0.2 to 0.95 of
    FA2's time where this says so; elsewhere about as long, or up to 8 times as long.
    """
    if num_queries >= 2 * TILE_TOKENS or (num_queries >= TILE_TOKENS and history <= SHORT_HISTORY_TOKENS):
        return True
    return 2 * num_queries >= TILE_TOKENS and num_tiles >= FILLED_SHARE * num_processors
