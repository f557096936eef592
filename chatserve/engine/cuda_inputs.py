"""What a step tells the GPU: small integer arrays in one pinned block, carried over by one copy; and graphs' sizes.

It knows names and sizes, not what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 4  # int32 numbers: every array starts at 16 bytes
GRAPH_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
LARGE_GRAPH_STEP = 64
CAPTURED_SIZES = (16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 1024)
LARGE_SIZE_SHARE = 8  # larger steps are padded by less than one part in so many, or less than 128 tokens


class StepInputs:
    """Named int32 arrays of fixed size and fixed device address, so that CUDA graphs can read them.

    `put` writes the host's side; `send` copies all of it, queued on the current stream. The host's side may be
    written again once the copy has happened.
    """

    def __init__(self, sizes: Mapping[str, int], device: torch.device) -> None:
        starts, total = {}, 0
        for name, size in sizes.items():
            starts[name] = slice(total, total + size)
            total += -(-size // ALIGNMENT) * ALIGNMENT
        self._pinned = torch.zeros(total, dtype=torch.int32, pin_memory=True)
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        numbers = self._pinned.numpy()
        self._host = {name: numbers[place] for name, place in starts.items()}
        self._places = {name: self._device[place] for name, place in starts.items()}

    def put(
        self, name: str, values: Sequence[int] | npt.NDArray[np.int32], *, padded_to: int = 0, pad: int = 0
    ) -> None:
        """Write the first numbers of an array, and `pad` behind them up to `padded_to`."""
        host = self._host[name]
        host[: len(values)] = values
        host[len(values) : padded_to] = pad

    def send(self) -> None:
        """Queue the copy."""
        self._device.copy_(self._pinned, non_blocking=True)

    def on_device(self, name: str, count: int) -> Tensor:
        """The first `count` numbers of an array, int32."""
        return self._places[name][:count]


def step_sizes(max_step_tokens: int) -> list[int]:
    """The sizes that steps with prefill are padded to, `max_step_tokens` the last; captured up to the largest of those.

    cuBLAS takes up to 30 ms to prepare for a number of rows that it has not seen, so all of them are tried beforehand.
    """
    sizes = [size for size in CAPTURED_SIZES if size < max_step_tokens]
    while (size := _next_large_size(sizes[-1] if sizes else 0)) < max_step_tokens:
        sizes.append(size)
    return [*sizes, max_step_tokens]


def _next_large_size(size: int) -> int:
    return size + max(128, 1 << (size // LARGE_SIZE_SHARE).bit_length() - 1 if size >= LARGE_SIZE_SHARE else 0)


def padded(count: int, sizes: Sequence[int]) -> int:
    """The first of ascending `sizes` that is not below `count`."""
    return next(size for size in sizes if size >= count)


def graph_batches(max_running: int) -> list[int]:
    """The batch sizes that are captured, `max_running` the last: close enough that padding costs little."""
    beyond = range(GRAPH_BATCHES[-1] + LARGE_GRAPH_STEP, max_running, LARGE_GRAPH_STEP)
    return [*(batch for batch in (*GRAPH_BATCHES, *beyond) if batch < max_running), max_running]
