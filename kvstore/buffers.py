"""Host memory for copies of pages, a buffer a page: who needs one takes it, and keeps it for the next page.

It knows bytes; what lies in a buffer, and who copies, is others' business.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Buffer = npt.NDArray[np.uint8]


class Buffers(Protocol):
    """At most `num_slots` buffers of one page each; that number falls when the system turns out to have less."""

    @property
    def num_slots(self) -> int: ...

    def take(self) -> Buffer | None:
        """A buffer that nobody has; None while the next one is being made, and when all are taken."""
        ...

    def close(self) -> None:
        """Give back what a device was told of; buffers must not be touched afterwards."""
        ...


class PlainBuffers:
    """See `Buffers`: ordinary memory, made when it is taken."""

    def __init__(self, budget_bytes: int, page_bytes: int) -> None:
        self.num_slots = budget_bytes // page_bytes
        self._page_bytes = page_bytes
        self._num_taken = 0

    def take(self) -> Buffer | None:
        """See `Buffers.take`."""
        if self._num_taken == self.num_slots:
            return None
        self._num_taken += 1
        return np.empty(self._page_bytes, np.uint8)

    def close(self) -> None:
        """See `Buffers.close`."""
