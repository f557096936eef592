"""Histories on their way up: read from disk into host memory, copied from there to the device, put in the index.

What to bring back is decided elsewhere; this only moves it, and learns how long that takes. Single-threaded; only bytes
move in other threads.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Literal

from kvstore.arrays import PageArray, TokenArray
from kvstore.cost import LinearCost
from kvstore.disk import DiskTier
from kvstore.disk.records import Reason
from kvstore.host import HostPage, HostTier
from kvstore.layout import KVLayout
from kvstore.pool import PagePool
from kvstore.transfer import Transfer, Transfers

Failure = Literal["checksum_failed", "read_failed"]


@dataclass(eq=False, slots=True)
class Promotion:
    """The rows of `tokens` behind those of the pages `before`, which are held meanwhile, on their way up.

    Those of `copies` at `unread` are read from disk first: `num_whole` from the first on are in host memory by now, and
    `num_sent` of these on their way to the device. `num_wanted` requests wait: ask `is_awaited` until it is
    not, then lease, and end it. `give_up_s`: by then (`time.monotonic()`) they could have computed the rows. `is_last`:
    nothing is left below behind it. `num_arrived` pages are in the index already. `failure`: why some of what was there
    did not come. `seconds`: how long it took in all.
    """

    salt: bytes
    tokens: TokenArray
    before: PageArray
    pages: PageArray
    copies: list[HostPage]
    unread: list[int]
    began_s: float
    give_up_s: float
    is_last: bool = False
    num_wanted: int = 1
    num_whole: int = 0
    num_sent: int = 0
    num_arrived: int = 0
    is_over: bool = False
    failure: Failure | None = None
    seconds: float = 0.0
    reading: deque[tuple[int, Future[Failure | None]]] = field(default_factory=deque)  # numbers of copies
    arriving: deque[tuple[slice, Transfer]] = field(default_factory=deque)  # batches of pages

    @property
    def has_tail(self) -> bool:
        """Whether the last page is not complete: its rows are those of the last tokens."""
        return bool(self.copies) and self.copies[-1].num_bytes < len(self.copies[-1].buffer)

    @property
    def has_arrived(self) -> bool:
        """Whether all of it is in the index."""
        return self.num_arrived == len(self.copies)

    @property
    def has_failed(self) -> bool:
        """Whether some of what was there did not come."""
        return self.failure is not None

    @property
    def is_awaited(self) -> bool:
        """Whether it is better to wait for it than to compute its rows."""
        return not self.is_over and time.monotonic() < self.give_up_s


@dataclass(slots=True)
class PromotionCounts:
    """Pages brought back so far and the bytes of their rows, and pages whose way up failed."""

    host: int = 0
    disk: int = 0
    failed: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0

    def add(self, promotion: Promotion) -> None:
        """Its pages have arrived."""
        copies = promotion.copies[: promotion.num_arrived]
        unread = [number for number in promotion.unread if number < promotion.num_arrived]
        from_disk = sum(copies[number].num_bytes for number in unread)
        self.disk += len(unread)
        self.disk_bytes += from_disk
        self.host += len(copies) - len(unread)
        self.host_bytes += sum(copy.num_bytes for copy in copies) - from_disk


class Promotions:
    """All of one store. `index` puts what has arrived into the store's index."""

    def __init__(
        self,
        layout: KVLayout,
        pool: PagePool,
        host: HostTier,
        disk: DiskTier | None,
        transfers: Transfers,
        disk_threads: Executor,
        index: Callable[[Promotion], None],
    ) -> None:
        self.counts = PromotionCounts()
        self.host_cost = LinearCost()  # of pages copied up from host memory
        self.disk_cost = LinearCost()  # of pages that are read from disk, until they are in host memory
        self._layout = layout
        self._pool = pool
        self._host = host
        self._disk = disk
        self._transfers = transfers
        self._disk_threads = disk_threads
        self._index = index
        self._batch_pages = max(1, transfers.batch_bytes // layout.page_bytes)
        self._promotions: list[Promotion] = []

    @property
    def is_moving(self) -> bool:
        """Whether anything is on its way."""
        return any(not promotion.is_over for promotion in self._promotions)

    @property
    def held_pages(self) -> list[PageArray]:
        """The pages held for promotions, once for each hold."""
        return [pages for promotion in self._promotions for pages in (promotion.before, promotion.pages)]

    def begin(self, promotion: Promotion) -> None:
        """Its pages, those before it and its copies are held from now on, by the caller's hand."""
        self._promotions.append(promotion)
        if self._disk is not None:
            jobs = [self._disk_threads.submit(_read, self._disk, promotion.copies[at]) for at in promotion.unread]
            promotion.reading.extend(zip(promotion.unread, jobs, strict=True))
        promotion.num_whole = promotion.unread[0] if promotion.unread else len(promotion.copies)
        self._copy_up(promotion)

    def find(self, key: bytes) -> Promotion | None:
        """One that is bringing this page back already."""
        active = (promotion for promotion in self._promotions if not promotion.is_over)
        return next((found for found in active if any(copy.key == key for copy in found.copies)), None)

    def end(self, promotion: Promotion) -> None:
        """The promotion's pages need not be held any more, or, before it is over, not longer than until then."""
        promotion.num_wanted -= 1
        self._release_unwanted(promotion)

    def advance(self) -> None:
        """Take in what has arrived."""
        for promotion in [promotion for promotion in self._promotions if not promotion.is_over]:
            if promotion.reading:
                self._take_read(promotion)
                self._copy_up(promotion)
            while promotion.arriving and promotion.arriving[0][1].done():
                self._take_batch(promotion, *promotion.arriving.popleft())

    def let_go(self, copies: Sequence[HostPage]) -> None:
        """Hold these copies no longer; those that were not read are forgotten."""
        for copy in copies:
            if copy.is_whole:
                self._host.unpin(copy)
            else:
                self._host.abandon(copy)

    def _copy_up(self, promotion: Promotion) -> None:
        """Send up what is in host memory, in batches, of which each is used as soon as it has arrived."""
        while promotion.num_sent < promotion.num_whole:
            end = min(promotion.num_sent + self._batch_pages, promotion.num_whole)
            if promotion.reading and end < promotion.num_sent + self._batch_pages:
                break
            batch = slice(promotion.num_sent, end)
            buffers = [copy.rows for copy in promotion.copies[batch]]
            promotion.arriving.append((batch, self._transfers.up(promotion.pages[batch].tolist(), buffers)))
            promotion.num_sent = end
        if not promotion.reading and not promotion.arriving:
            self._finish(promotion)

    def _take_read(self, promotion: Promotion) -> None:
        """Count what was read; where a page was not read well, it and those behind it are given back in the end."""
        while promotion.reading and promotion.reading[0][1].done():
            number, job = promotion.reading.popleft()
            failure = "read_failed" if job.exception() else job.result()
            promotion.copies[number].is_whole = failure is None
            self.counts.failed += failure is not None
            promotion.failure = promotion.failure or failure
            if promotion.failure is None:
                promotion.num_whole = promotion.reading[0][0] if promotion.reading else len(promotion.copies)
        if not promotion.reading and promotion.failure is None:
            self.disk_cost.observe(len(promotion.unread), time.monotonic() - promotion.began_s)
        elif not promotion.reading:
            self._shorten(promotion, promotion.num_whole)

    def _shorten(self, promotion: Promotion, num_pages: int) -> None:
        self._pool.unref(promotion.pages[num_pages:])
        self.let_go(promotion.copies[num_pages:])
        promotion.pages, promotion.copies = promotion.pages[:num_pages], promotion.copies[:num_pages]
        promotion.unread = [number for number in promotion.unread if number < num_pages]
        promotion.tokens = promotion.tokens[: self._layout.tokens_to_fill(len(promotion.before) + num_pages)]

    def _take_batch(self, promotion: Promotion, batch: slice, transfer: Transfer) -> None:
        """A batch has arrived: its pages can be used if those before them can."""
        if promotion.num_arrived == batch.start and not transfer.failed():
            self.host_cost.observe(batch.stop - batch.start, transfer.seconds)
            promotion.num_arrived = batch.stop
            self._index(promotion)
        if not promotion.reading and not promotion.arriving:
            self._finish(promotion)

    def _finish(self, promotion: Promotion) -> None:
        if not promotion.has_arrived:
            promotion.failure = promotion.failure or "read_failed"
            self.counts.failed += len(promotion.copies) - promotion.num_arrived
        self.let_go(promotion.copies)
        self.counts.add(promotion)
        promotion.is_over, promotion.seconds = True, time.monotonic() - promotion.began_s
        self._release_unwanted(promotion)

    def _release_unwanted(self, promotion: Promotion) -> None:
        if promotion.is_over and not promotion.num_wanted:
            self._promotions.remove(promotion)
            self._pool.unref(promotion.before)
            self._pool.unref(promotion.pages)


def _read(disk: DiskTier, copy: HostPage) -> Failure | None:
    """Why the page was not read whole; None where it was."""
    found = disk.read(copy.key, copy.buffer.data)
    if found == copy.num_bytes:
        return None
    return "checksum_failed" if found in (Reason.CHECKSUM, Reason.RECORD_HEADER) else "read_failed"
