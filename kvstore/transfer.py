"""Copies between a device's pages and host memory, made beside the step: begun here, finished elsewhere, asked for.

On the CPU two threads copy, one each way, without the interpreter's lock. It knows page numbers and buffers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from kvstore.buffers import Buffer


class Transfer(Protocol):
    """Copies on their way. The pages and buffers must stay as they are until it is done."""

    @property
    def seconds(self) -> float:
        """After the end: how long the copies took, without what they waited for."""
        ...

    def done(self) -> bool:
        """Whether it is over, well or not."""
        ...

    def failed(self) -> bool:
        """After the end: whether what it wrote is not to be used."""
        ...


class Transfers(Protocol):
    """One device's copies, each way carried out in the order in which they are begun.

    `batch_bytes` at once keep it busy; more than `max_batches` on their way gain nothing.
    """

    batch_bytes: int
    max_batches: int

    def down(self, pages: Sequence[int], buffers: Sequence[Buffer]) -> Transfer:
        """Copy pages of rows that do not change into buffers [at most page_bytes] each."""
        ...

    def up(self, pages: Sequence[int], buffers: Sequence[Buffer]) -> Transfer:
        """Copy buffers into pages that nobody reads yet."""
        ...

    def pace(self, busy_s: float) -> None:
        """Go on, once a step: the device is busy for about so long, and its own copies should not have to wait."""
        ...

    def close(self) -> None:
        """Finish what was begun."""
        ...


class ThreadTransfer:
    """See `Transfer`; one job of a thread, which gives the seconds that it took."""

    def __init__(self, job: Future[float]) -> None:
        self._job = job

    @property
    def seconds(self) -> float:
        """See `Transfer.seconds`."""
        return 0.0 if self.failed() else self._job.result()

    def done(self) -> bool:
        """See `Transfer.done`."""
        return self._job.done()

    def failed(self) -> bool:
        """See `Transfer.failed`."""
        return self._job.exception() is not None


class FileTransfers:
    """See `Transfers`, for pages in a file such as a memfd: page `i` is its bytes from `i * page_bytes` on."""

    batch_bytes = 16 << 20
    max_batches = 1

    def __init__(self, file: int, page_bytes: int) -> None:
        self._file = file
        self._page_bytes = page_bytes
        self._down_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvstore-down")
        self._up_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvstore-up")

    def down(self, pages: Sequence[int], buffers: Sequence[Buffer]) -> ThreadTransfer:
        """See `Transfers.down`."""
        return ThreadTransfer(self._down_thread.submit(self._read, tuple(pages), tuple(buffers)))

    def up(self, pages: Sequence[int], buffers: Sequence[Buffer]) -> ThreadTransfer:
        """See `Transfers.up`."""
        return ThreadTransfer(self._up_thread.submit(self._write, tuple(pages), tuple(buffers)))

    def pace(self, busy_s: float) -> None:
        """See `Transfers.pace`; the threads do not need to be told."""

    def close(self) -> None:
        """See `Transfers.close`."""
        self._down_thread.shutdown()
        self._up_thread.shutdown()

    def _read(self, pages: Sequence[int], buffers: Sequence[Buffer]) -> float:
        began_s = time.perf_counter()
        for page, buffer in zip(pages, buffers, strict=True):
            if os.preadv(self._file, [buffer.data], page * self._page_bytes) != len(buffer):
                raise OSError(f"page {page} was not read whole")
        return time.perf_counter() - began_s

    def _write(self, pages: Sequence[int], buffers: Sequence[Buffer]) -> float:
        began_s = time.perf_counter()
        for page, buffer in zip(pages, buffers, strict=True):
            if os.pwritev(self._file, [buffer.data], page * self._page_bytes) != len(buffer):
                raise OSError(f"page {page} was not written whole")
        return time.perf_counter() - began_s
