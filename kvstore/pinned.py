"""Host memory that a CUDA device copies from and to by itself, made by a thread beside whatever else goes on.

Asking the driver for such memory holds up everybody else's calls while it clears pages, 4 ms for 8 MiB. So ordinary
memory of huge pages is touched first, and then pinned in place, which takes 1.5 ms for 64 MiB (measured on an H200).
All of it is made from the start on, at 7 GB/s, while the model is loaded: later it would hold up steps.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections import deque

import numpy as np

from kvstore.buffers import Buffer
from kvstore.driver import CudaDriver
from kvstore.errors import MemoryRefused
from kvstore.linux import MAP_NORESERVE

CHUNK_BYTES = 64 << 20
HUGE_BYTES = 2 << 20
logger = logging.getLogger(__name__)


class PinnedBuffers:
    """See `Buffers`; `CHUNK_BYTES` are pinned at once."""

    def __init__(self, budget_bytes: int, page_bytes: int, driver: CudaDriver) -> None:
        self.num_slots = budget_bytes // page_bytes
        self._page_bytes = page_bytes
        self._driver = driver
        num_bytes = self.num_slots * page_bytes + HUGE_BYTES
        self._memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._start = -self._bytes.ctypes.data % HUGE_BYTES
        self._pinned: list[int] = []  # addresses of chunks
        self._ready: deque[Buffer] = deque()
        self._num_made = 0
        self._lock = threading.Lock()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kvstore-pin", daemon=True)
        self._thread.start()

    def take(self) -> Buffer | None:
        """See `Buffers.take`."""
        with self._lock:
            return self._ready.popleft() if self._ready else None

    def close(self) -> None:
        """See `Buffers.close`."""
        self._is_closing = True
        self._thread.join()
        for address in self._pinned:
            self._driver.unpin(address)

    def _run(self) -> None:
        self._driver.attach()
        while self._num_made < self.num_slots and not self._is_closing:
            try:
                self._make_chunk()
            except MemoryRefused as refusal:
                self._make_do(refusal)

    def _make_chunk(self) -> None:
        num_pages = min(max(1, CHUNK_BYTES // self._page_bytes), self.num_slots - self._num_made)
        start = self._start + self._num_made * self._page_bytes
        chunk = self._bytes[start : start + num_pages * self._page_bytes]
        chunk[:: mmap.PAGESIZE] = 0  # the system clears its pages here, not in the driver, whose lock all share
        self._driver.pin(chunk.ctypes.data, chunk.nbytes)
        with self._lock:
            self._pinned.append(chunk.ctypes.data)
            self._num_made += num_pages
            self._ready.extend(chunk.reshape(num_pages, self._page_bytes))

    def _make_do(self, refusal: MemoryRefused) -> None:
        """Go on with what there is."""
        logger.warning(
            "host memory for histories: %s; going on with %d of %d bytes",
            refusal, self._num_made * self._page_bytes, self.num_slots * self._page_bytes,
        )  # fmt: skip
        with self._lock:
            self.num_slots = self._num_made
