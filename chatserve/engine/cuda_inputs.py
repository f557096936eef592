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
PREFILL_SIZES = (16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 1024)


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


def graph_batches(max_running: int) -> list[int]:
    """The batch sizes that are captured, `max_running` the last: close enough that padding costs little."""
    beyond = range(GRAPH_BATCHES[-1] + LARGE_GRAPH_STEP, max_running, LARGE_GRAPH_STEP)
    return [*(batch for batch in (*GRAPH_BATCHES, *beyond) if batch < max_running), max_running]
