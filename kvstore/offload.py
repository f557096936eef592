"""Pages on their way down: from the device to host memory, and from there to disk, one batch of each at a time.

It is told of pages in the order in which they should go, and asks what they hold when their turn comes: by then they
may be gone, or saved. It knows neither tokens nor who wants pages back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

from kvstore.arrays import PageArray, as_page_array
from kvstore.disk import DiskTier
from kvstore.host import HostPage, HostTier
from kvstore.keys import NamedPage
from kvstore.pool import PagePool
from kvstore.transfer import Transfer, Transfers

MAX_BATCH_BYTES = 16 << 20  # of one copy down: what a copy up may have to wait for


@dataclass(frozen=True, slots=True)
class Offload:
    """Pages, held meanwhile, on their way to host memory."""

    pages: PageArray
    copies: list[HostPage]
    transfer: Transfer


@dataclass(frozen=True, slots=True)
class Writing:
    """Host pages, held meanwhile, on their way to disk; the job gives how many are there."""

    copies: list[HostPage]
    job: Future[int]


class Offloads:
    """`named` says what a page holds (None when nothing that is shared), `is_below` whether a key needs no copy."""

    def __init__(
        self,
        pool: PagePool,
        host: HostTier,
        disk: DiskTier | None,
        transfers: Transfers,
        disk_thread: Executor,
        *,
        page_bytes: int,
        named: Callable[[int], NamedPage | None],
        is_below: Callable[[bytes], bool],
    ) -> None:
        self.num_offloaded = 0
        self.num_written = 0
        self.num_failed = 0
        self._pool = pool
        self._host = host
        self._disk = disk
        self._transfers = transfers
        self._disk_thread = disk_thread
        self._batch_pages = max(1, MAX_BATCH_BYTES // page_bytes)
        self._named = named
        self._is_below = is_below
        self._to_offload: deque[int] = deque()  # pages, perhaps gone or saved since
        self._to_write: deque[bytes] = deque()  # keys, perhaps forgotten since
        self._offload: Offload | None = None
        self._writing: Writing | None = None

    @property
    def is_moving(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._offload or self._writing)

    @property
    def is_done(self) -> bool:
        """Whether all that was queued has gone as far down as it can."""
        return not (self.is_moving or self._to_offload or (self._disk and self._to_write))

    @property
    def held_pages(self) -> list[PageArray]:
        """The pages held for what is on its way."""
        return [self._offload.pages] if self._offload else []

    def queue(self, page: int) -> None:
        """This page should go down, after those queued before."""
        self._to_offload.append(page)

    def tend(self, *, may_begin: bool) -> None:
        """Take in what has arrived and send what should go; from the device only where that `may_begin` now."""
        self._finish_offload()
        self._finish_writing()
        if self._offload is None and may_begin:
            self._begin_offload()
        if self._writing is None and self._disk is not None:
            self._begin_writing(self._disk)

    def _begin_offload(self) -> None:
        pages: list[int] = []
        copies: list[HostPage] = []
        while self._to_offload and len(pages) < self._batch_pages:
            page = self._to_offload[0]
            named = self._named(page)
            if named is not None and not self._is_below(named.key):
                copy = self._host.reserve(named.key, named.num_bytes)
                if copy is None and named.key not in self._host:
                    break  # host memory is full of what is on its way
                if copy is not None:
                    pages.append(page)
                    copies.append(copy)
            self._to_offload.popleft()
        if pages:
            array = as_page_array(pages)
            self._pool.ref(array)
            self._offload = Offload(array, copies, self._transfers.down(pages, [copy.buffer for copy in copies]))

    def _finish_offload(self) -> None:
        offload = self._offload
        if offload is None or not offload.transfer.done():
            return
        self._offload = None
        self._pool.unref(offload.pages)
        if offload.transfer.failed():
            self.num_failed += len(offload.copies)
            for copy in offload.copies:
                self._host.abandon(copy)
            return
        self.num_offloaded += len(offload.copies)
        for copy in offload.copies:
            self._host.fill(copy)
            self._to_write.append(copy.key)

    def _begin_writing(self, disk: DiskTier) -> None:
        copies: list[HostPage] = []
        while self._to_write and len(copies) < self._batch_pages:
            key = self._to_write.popleft()
            if not disk.contains(key) and (copy := self._host.pin(key)) is not None:
                copies.append(copy)
        if copies:
            records = [(copy.key, copy.buffer[: copy.num_bytes].data) for copy in copies]
            self._writing = Writing(copies, self._disk_thread.submit(_put, disk, records))

    def _finish_writing(self) -> None:
        writing = self._writing
        if writing is None or not writing.job.done():
            return
        self._writing = None
        for copy in writing.copies:
            self._host.unpin(copy)
        num_written = 0 if writing.job.exception() else writing.job.result()
        self.num_written += num_written
        self.num_failed += len(writing.copies) - num_written


def _put(disk: DiskTier, records: Sequence[tuple[bytes, memoryview]]) -> int:
    return disk.put(records)
