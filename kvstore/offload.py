"""Pages on their way down: from the device to host memory, and from there to disk, in batches.

It is told of pages in the order in which they should go, and asks what they hold when their turn comes: by then they
may be gone, or saved. It knows neither tokens nor who wants pages back.
"""

from __future__ import annotations

import time
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

HELD_SHARE = 8  # at most one page in so many is held because it is on its way down
WRITE_BYTES = 32 << 20  # at a time: for so long others wait who make something durable on that disk, like a log
REST = 2.0  # times as long as a write took, the disk is left to others
REST_WHILE_AWAITED = 8.0  # where somebody waits for a first token, which is sent once it is durable on that disk
AWAITED_S = 0.1  # how long somebody is taken to wait on after they did: what was computed is not sent yet


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
    began_s: float


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
        self.offloaded_bytes = 0
        self.num_written = 0
        self.written_bytes = 0
        self.num_failed = 0
        self._pool = pool
        self._host = host
        self._disk = disk
        self._transfers = transfers
        self._disk_thread = disk_thread
        self._batch_pages = max(1, transfers.batch_bytes // page_bytes)
        self._write_pages = max(1, WRITE_BYTES // page_bytes)
        self._max_pages = max(1, min(transfers.max_batches * self._batch_pages, pool.capacity_pages // HELD_SHARE))
        self._named = named
        self._is_below = is_below
        self._to_offload: deque[int] = deque()  # pages, perhaps gone or saved since
        self._to_write: deque[bytes] = deque()  # keys, perhaps forgotten since
        self._offloads: deque[Offload] = deque()
        self._writing: Writing | None = None
        self._wrote_s = 0.0  # when the last write ended
        self._write_took_s = 0.0
        self._awaited_s = -AWAITED_S  # when somebody last waited for a first token

    @property
    def is_moving(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._offloads or self._writing)

    @property
    def is_done(self) -> bool:
        """Whether all that was queued has gone as far down as it can."""
        return not (self.is_moving or self._to_offload or self.is_behind)

    @property
    def is_behind(self) -> bool:
        """Whether something in host memory is to be written yet, now or when the disk has rested."""
        return self._disk is not None and bool(self._to_write)

    @property
    def held_pages(self) -> list[PageArray]:
        """The pages held for what is on its way."""
        return [offload.pages for offload in self._offloads]

    def queue(self, page: int) -> None:
        """This page should go down, after those queued before."""
        self._to_offload.append(page)

    def tend(self, *, may_begin: bool, is_awaited: bool = False, in_haste: bool = False) -> None:
        """Take in what has arrived and send what should go; from the device only where that `may_begin` now.

        `is_awaited`: somebody waits for a first token, so the disk rests longer. `in_haste`: it has not to rest.
        """
        while self._offloads and self._offloads[0].transfer.done():
            self._finish_offload(self._offloads.popleft())
        self._finish_writing()
        if is_awaited:
            self._awaited_s = time.monotonic()
        while may_begin and self._begin_offload():
            pass
        if self._writing is None and self._disk is not None and (in_haste or self._may_write):
            self._begin_writing(self._disk)

    @property
    def _may_write(self) -> bool:
        """Whether the disk has rested, or host memory is half full of what is not on it."""
        now_s = time.monotonic()
        rest = REST_WHILE_AWAITED if now_s < self._awaited_s + AWAITED_S else REST
        has_rested = now_s >= self._wrote_s + rest * self._write_took_s
        return has_rested or len(self._to_write) > self._host.num_slots // 2

    def _begin_offload(self) -> bool:
        """Send the next batch; False where there is none, no memory for it, or enough on its way."""
        pages: list[int] = []
        copies: list[HostPage] = []
        most = min(self._batch_pages, self._max_pages - sum(len(offload.pages) for offload in self._offloads))
        while self._to_offload and len(pages) < most:
            page = self._to_offload[0]
            named = self._named(page)
            if named is not None and not self._is_below(named.key):
                copy = self._host.reserve(named.key, named.num_bytes)
                if copy is None and named.key not in self._host:
                    break  # no buffer is to be had before something has arrived
                if copy is not None:
                    pages.append(page)
                    copies.append(copy)
            self._to_offload.popleft()
        if pages:
            array = as_page_array(pages)
            self._pool.ref(array)
            transfer = self._transfers.down(pages, [copy.rows for copy in copies])
            self._offloads.append(Offload(array, copies, transfer))
        return bool(pages)

    def _finish_offload(self, offload: Offload) -> None:
        self._pool.unref(offload.pages)
        if offload.transfer.failed():
            self.num_failed += len(offload.copies)
            for copy in offload.copies:
                self._host.abandon(copy)
            return
        self.num_offloaded += len(offload.copies)
        self.offloaded_bytes += sum(copy.num_bytes for copy in offload.copies)
        for copy in offload.copies:
            self._host.fill(copy)
            self._to_write.append(copy.key)

    def _begin_writing(self, disk: DiskTier) -> None:
        copies: list[HostPage] = []
        while self._to_write and len(copies) < self._write_pages:
            key = self._to_write.popleft()
            if not disk.contains(key) and (copy := self._host.pin(key)) is not None:
                copies.append(copy)
        if copies:
            records = [(copy.key, copy.rows.data) for copy in copies]
            self._writing = Writing(copies, self._disk_thread.submit(_put, disk, records), time.monotonic())

    def _finish_writing(self) -> None:
        writing = self._writing
        if writing is None or not writing.job.done():
            return
        self._writing = None
        self._wrote_s = time.monotonic()
        self._write_took_s = self._wrote_s - writing.began_s
        for copy in writing.copies:
            self._host.unpin(copy)
        num_written = 0 if writing.job.exception() else writing.job.result()
        self.num_written += num_written
        self.written_bytes += sum(copy.num_bytes for copy in writing.copies[:num_written])
        self.num_failed += len(writing.copies) - num_written


def _put(disk: DiskTier, records: Sequence[tuple[bytes, memoryview]]) -> int:
    return disk.put(records)
