"""Copies between a device's pages and host memory, made beside the step: begun here, finished elsewhere, asked for.

On the CPU a thread copies, which does not hold the interpreter's lock meanwhile. It knows page numbers and buffers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from kvstore.host import Buffer


class Transfer(Protocol):
    """Copies on their way. The pages and buffers must stay as they are until it is done."""

    def done(self) -> bool:
        """Whether it is over, well or not."""
        ...

    def failed(self) -> bool:
        """After the end: whether what it wrote is not to be used."""
        ...


class Transfers(Protocol):
    """One device's copies, carried out in the order in which they are begun."""

    def down(self, pages: Sequence[int], buffers: Sequence[Buffer]) -> Transfer:
        """Copy pages of rows that do not change into buffers [at most page_bytes] each."""
        ...

    def up(self, pages: Sequence[int], buffers: Sequence[Buffer]) -> Transfer:
        """Copy buffers into pages that nobody reads yet."""
        ...

    def close(self) -> None:
        """Finish what was begun."""
        ...


class FileTransfer:
    """See `Transfer`; one job of the thread."""

    def __init__(self, job: Future[None]) -> None:
        self._job = job

    def done(self) -> bool:
        """See `Transfer.done`."""
        return self._job.done()

    def failed(self) -> bool:
        """See `Transfer.failed`."""
        return self._job.exception() is not None


class FileTransfers:
    """See `Transfers`, for pages in a file such as a memfd: page `i` is its bytes from `i * page_bytes` on."""

    def __init__(self, file: int, page_bytes: int) -> None:
        self._file = file
        self._page_bytes = page_bytes
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvstore-copy")

    def down(self, pages: Sequence[int], buffers: Sequence[Buffer]) -> FileTransfer:
        """See `Transfers.down`."""
        return FileTransfer(self._thread.submit(self._read, tuple(pages), tuple(buffers)))

    def up(self, pages: Sequence[int], buffers: Sequence[Buffer]) -> FileTransfer:
        """See `Transfers.up`."""
        return FileTransfer(self._thread.submit(self._write, tuple(pages), tuple(buffers)))

    def close(self) -> None:
        """See `Transfers.close`."""
        self._thread.shutdown()

    def _read(self, pages: Sequence[int], buffers: Sequence[Buffer]) -> None:
        for page, buffer in zip(pages, buffers, strict=True):
            if os.preadv(self._file, [buffer.data], page * self._page_bytes) != len(buffer):
                raise OSError(f"page {page} was not read whole")

    def _write(self, pages: Sequence[int], buffers: Sequence[Buffer]) -> None:
        for page, buffer in zip(pages, buffers, strict=True):
            if os.pwritev(self._file, [buffer.data], page * self._page_bytes) != len(buffer):
                raise OSError(f"page {page} was not written whole")
