"""Pages below the device: which have a copy in host memory or on disk, which are on their way down, which come back.

Pages go down in the order in which they were indexed, when the device runs short or has nothing to do; what is evicted
then is only forgotten up here. A history that is asked for again is promoted beside the running steps: read from disk,
copied up, and put in the index as if it had just been computed. Single-threaded; only bytes move elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile

from kvstore.arrays import PageArray, TokenArray
from kvstore.cost import LinearCost
from kvstore.disk import DiskTier
from kvstore.errors import OutOfPages
from kvstore.host import Buffer, HostPage, HostTier
from kvstore.keys import NamedPage, PageKeys
from kvstore.layout import KVLayout
from kvstore.offload import Offloads
from kvstore.pool import PagePool
from kvstore.transfer import Transfer, Transfers

SHORT_SHARE = 4  # the device is short when less than one part in so many can be handed out


@dataclass(frozen=True, slots=True)
class Below:
    """What lies below a store's device: `host_bytes` of buffers of one page each, and perhaps a disk.

    `open_disk` is given the fingerprint of records and the size of a page.
    """

    host_bytes: int
    make_buffer: Callable[[], Buffer]
    transfers: Transfers
    open_disk: Callable[[bytes, int], DiskTier] | None = None


@dataclass(eq=False, slots=True)
class Promotion:
    """The rows of `tokens` behind those of the pages `before`, which are held meanwhile, on their way up.

    `num_host` and `num_disk` pages come from each tier; where `has_tail` the last one is not complete, and its rows are
    those of the last tokens. `num_wanted` requests wait: ask `is_over` until it is, then lease, and `Tiers.end` it.
    `has_failed`: some of what was there could not be read.
    """

    salt: bytes
    tokens: TokenArray
    before: PageArray
    pages: PageArray
    copies: list[HostPage]
    num_disk: int
    has_tail: bool
    began_s: float
    reading: Future[int] | None = None
    transfer: Transfer | None = None
    is_over: bool = False
    num_wanted: int = 1
    has_failed: bool = False
    seconds: float = 0.0

    @property
    def num_host(self) -> int:
        """Pages that came from host memory."""
        return len(self.copies) - self.num_disk


@dataclass(slots=True)
class PromotionCounts:
    """Pages brought back so far, and pages whose way up failed."""

    host: int = 0
    disk: int = 0
    failed: int = 0


@dataclass(slots=True)
class Tiers:
    """Host memory and, where there is one, a disk under a store's pages; `insert` puts promoted ones in its index."""

    layout: KVLayout
    pool: PagePool
    keys: PageKeys
    host: HostTier
    transfers: Transfers
    disk: DiskTier | None
    insert: Callable[[Promotion], None]
    depth: Callable[[bytes, TokenArray], int]
    lookup: Callable[[bytes, TokenArray], PageArray]
    allocate: Callable[[int], PageArray]
    counts: PromotionCounts = field(default_factory=PromotionCounts)
    prefill_cost: LinearCost = field(default_factory=LinearCost)  # of tokens; observed by whoever computes them
    host_cost: LinearCost = field(default_factory=LinearCost)  # of pages that come back from host memory
    disk_cost: LinearCost = field(default_factory=LinearCost)  # of pages some of which come from disk
    _key_of: dict[int, bytes] = field(default_factory=dict)  # of every complete page in the index
    _tail_of: dict[int, NamedPage] = field(default_factory=dict)  # of tails in it
    _source_of: dict[int, str] = field(default_factory=dict)  # of promoted pages, until a turn uses them
    _promotions: list[Promotion] = field(default_factory=list)
    _disk_thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=2, thread_name_prefix="kvstore-disk")
    )
    offloads: Offloads = field(init=False)

    def __post_init__(self) -> None:
        self.offloads = Offloads(
            self.pool, self.host, self.disk, self.transfers, self._disk_thread,
            page_bytes=self.layout.page_bytes, named=self._named, is_below=self._is_below,
        )  # fmt: skip

    @property
    def is_moving(self) -> bool:
        """Whether anything is on its way; `tend` has more to do soon."""
        return self.offloads.is_moving or any(not promotion.is_over for promotion in self._promotions)

    def indexed(self, salt: bytes, tokens: TokenArray, pages: PageArray, num_known: int) -> None:
        """The pages of a path from `num_known` on are in the index since now."""
        key = self._key_of[int(pages[num_known - 1])] if num_known else self.keys.root(salt)
        first = self.keys.first_token
        for index in range(num_known, len(pages)):
            page = int(pages[index])
            key = self._key_of[page] = self.keys.page(key, tokens[first(index) : first(index + 1)])
            self._tail_of.pop(page, None)
            if not self._is_below(key):
                self.offloads.queue(page)

    def tail_indexed(self, salt: bytes, tokens: TokenArray, before: PageArray, page: int) -> None:
        """A path's last page, with rows up to its end, is in the index since now, behind the complete ones."""
        key = self._key_of[int(before[-1])] if len(before) else self.keys.root(salt)
        key = self.keys.tail(key, tokens[self.keys.first_token(len(before)) :])
        self._tail_of[page] = NamedPage(key, self.layout.boundary_bytes(len(tokens)))
        if not self._is_below(key):
            self.offloads.queue(page)

    def forget(self, pages: PageArray) -> None:
        """These pages leave the index; what was copied of them stays below."""
        for page in pages.tolist():
            self._key_of.pop(page, None)
            self._tail_of.pop(page, None)
            self._source_of.pop(page, None)

    @property
    def has_sources(self) -> bool:
        """Whether anything was brought back that no turn has used yet."""
        return bool(self._source_of)

    def take_sources(self, pages: Sequence[int], num_tokens: int) -> dict[str, int]:
        """Tokens in a path's pages by the tier they were brought back from; each page is told of once."""
        counts = dict.fromkeys(("host", "disk"), 0)
        for index, page in enumerate(pages):
            source = self._source_of.pop(page, None)
            if source is not None:
                start, end = self.layout.complete_tokens(index), self.layout.complete_tokens(index + 1)
                counts[source] += min(end, num_tokens) - start
        return counts

    def tend(self, *, idle: bool = False) -> None:
        """Take in what has arrived and send what should go; quick, once a step. `idle`: nobody needs the device."""
        self._advance_promotions()
        self.offloads.tend(may_begin=idle or self._is_short)

    def promote(self, salt: bytes, tokens: TokenArray) -> Promotion | None:
        """Begin to bring back what there is of a history behind what is in the index; None where that is nothing."""
        if not len(self.host) and self.disk is None:
            return None
        before = self.lookup(salt, tokens)
        found = self._find_below(salt, tokens, len(before))
        if not found:
            return None
        if (coming := self._find_coming(found[0].key)) is not None:
            coming.num_wanted += 1
            return coming
        if not self._is_worth_it(len(before), found):
            return None
        copies, num_disk = self._collect(found)
        if not copies:
            return None
        self.pool.ref(before)
        try:
            pages = self.allocate(len(copies))
        except OutOfPages:
            self.pool.unref(before)
            self._let_go(copies)
            return None
        has_tail = copies[-1].num_bytes < self.layout.page_bytes
        end = self._end_of(len(before), copies)
        promotion = Promotion(salt, tokens[:end], before, pages, copies, num_disk, has_tail, time.monotonic())
        self._begin_promotion(promotion)
        self._promotions.append(promotion)
        return promotion

    def below(self, salt: bytes, tokens: TokenArray, num_before: int) -> dict[str, int]:
        """Tokens behind the first `num_before` pages that host memory, and then the disk, would give."""
        found = self._find_below(salt, tokens, num_before)
        num_host = sum(1 for _ in takewhile(lambda page: page.key in self.host, found))
        ends = [self._rows_of(num_before, found[:count]) for count in (0, num_host, len(found))]
        return {"host": ends[1] - ends[0], "disk": ends[2] - ends[1]}

    def restore_s(self, salt: bytes, tokens: TokenArray, num_before: int) -> float:
        """How long bringing these back would take, by what it took before; 0 for nothing."""
        found = self._find_below(salt, tokens, num_before)
        return self._cost_of(found).estimate(len(found)) if found else 0.0

    def end(self, promotion: Promotion) -> None:
        """The promotion's pages need not be held any more, or, before it is over, not longer than until then."""
        promotion.num_wanted -= 1
        self._release_unwanted(promotion)

    def _release_unwanted(self, promotion: Promotion) -> None:
        if promotion.is_over and not promotion.num_wanted:
            self._promotions.remove(promotion)
            self.pool.unref(promotion.before)
            self.pool.unref(promotion.pages)

    def flush(self, deadline_s: float) -> bool:
        """Send down all there is, until it is there or `time.monotonic()` passes the deadline; whether it is."""
        while time.monotonic() < deadline_s:
            self.tend(idle=True)
            if self.offloads.is_done and not self.is_moving:
                return True
            time.sleep(0.0005)
        return False

    def figures(self) -> dict[str, int]:
        """The tiers' part of `KVStats`."""
        counts = self.counts
        return {
            "host_bytes": len(self.host) * self.layout.page_bytes,
            "disk_bytes": self.disk.stats().file_bytes if self.disk else 0,
            "offloaded_pages": self.offloads.num_offloaded,
            "written_pages": self.offloads.num_written,
            "promoted_host_pages": counts.host,
            "promoted_disk_pages": counts.disk,
            "failed_pages": counts.failed + self.offloads.num_failed,
        }

    def held_pages(self) -> list[PageArray]:
        """Arrays of the pages that are held for what is on its way, once for each hold."""
        return self.offloads.held_pages + [
            pages for promotion in self._promotions for pages in (promotion.before, promotion.pages)
        ]

    def close(self) -> None:
        """Finish what is on its way and end the threads."""
        self.transfers.close()
        self._disk_thread.shutdown()
        if self.disk is not None:
            self.disk.close()

    @property
    def _is_short(self) -> bool:
        return self.pool.num_available * SHORT_SHARE < self.pool.capacity_pages

    def _is_below(self, key: bytes) -> bool:
        return key in self.host or (self.disk is not None and self.disk.contains(key))

    def _named(self, page: int) -> NamedPage | None:
        """What the page holds, complete or not; None where it left the index."""
        key = self._key_of.get(page)
        return self._tail_of.get(page) if key is None else NamedPage(key, self.layout.page_bytes)

    def _find_below(self, salt: bytes, tokens: TokenArray, num_before: int) -> list[NamedPage]:
        """The pages behind the first ones that lie below, up to the first that does not, or a tail in its place."""
        keys = self.keys.of_path(salt, tokens)
        below = list(takewhile(self._is_below, keys[num_before:]))
        found = [NamedPage(key, self.layout.page_bytes) for key in below]
        num_pages = num_before + len(below)
        tail = self._find_tail(keys[num_pages - 1] if num_pages else self.keys.root(salt), tokens, num_pages)
        if tail is not None and (found or self._rows_of(num_before, [tail]) > self.depth(salt, tokens)):
            found.append(tail)
        return found

    def _find_tail(self, before: bytes, tokens: TokenArray, num_pages: int) -> NamedPage | None:
        """The longest tail below that continues a path's complete pages; each length has a key of its own."""
        first = self.keys.first_token(num_pages)
        most = min(len(tokens), self.keys.first_token(num_pages + 1) - 1)
        for end in range(most, first - 1, -1):
            num_bytes = self.layout.boundary_bytes(end)
            key = self.keys.tail(before, tokens[first:end])
            if num_bytes and self._is_below(key):
                return NamedPage(key, num_bytes)
        return None

    def _rows_of(self, num_before: int, pages: Sequence[NamedPage | HostPage]) -> int:
        """Tokens whose rows lie in these pages and the ones before."""
        num_bytes = num_before * self.layout.page_bytes + sum(page.num_bytes for page in pages)
        return num_bytes // self.layout.token_bytes

    def _end_of(self, num_before: int, copies: Sequence[HostPage]) -> int:
        """Where the path ends that these pages complete, or whose rows the last of them has."""
        if copies and copies[-1].num_bytes < self.layout.page_bytes:
            return self._rows_of(num_before, copies)
        return self.layout.tokens_to_fill(num_before + len(copies))

    def _find_coming(self, key: bytes) -> Promotion | None:
        """A promotion that is bringing this page back already."""
        active = (promotion for promotion in self._promotions if not promotion.is_over)
        return next((found for found in active if any(copy.key == key for copy in found.copies)), None)

    def _is_worth_it(self, num_before: int, found: Sequence[NamedPage]) -> bool:
        """Whether bringing these pages back takes less time than computing their tokens, as far as that is known."""
        num_tokens = self._rows_of(num_before, found) - self._rows_of(num_before, [])
        computing_s = self.prefill_cost.estimate(num_tokens) - self.prefill_cost.estimate(0)
        return not self.prefill_cost.is_known or self._cost_of(found).estimate(len(found)) <= computing_s

    def _cost_of(self, pages: Sequence[NamedPage | HostPage]) -> LinearCost:
        return self.host_cost if all(page.key in self.host for page in pages) else self.disk_cost

    def _collect(self, found: Sequence[NamedPage]) -> tuple[list[HostPage], int]:
        """Held host pages for as many, from the first on, as there are; the last ones still to be read."""
        copies: list[HostPage] = []
        for page in found:
            copy = self.host.pin(page.key)
            if copy is None:
                break
            copies.append(copy)
        num_host = len(copies)
        for page in found[num_host:]:
            copy = self._reserve_to_read(page)
            if copy is None:
                break
            copies.append(copy)
        return copies, len(copies) - num_host

    def _reserve_to_read(self, page: NamedPage) -> HostPage | None:
        if self.disk is None or not self.disk.contains(page.key):
            return None
        return self.host.reserve(page.key, page.num_bytes)

    def _begin_promotion(self, promotion: Promotion) -> None:
        if promotion.num_disk and self.disk is not None:
            unread = promotion.copies[promotion.num_host :]
            promotion.reading = self._disk_thread.submit(_read, self.disk, unread)
        else:
            self._copy_up(promotion)

    def _copy_up(self, promotion: Promotion) -> None:
        buffers = [copy.buffer for copy in promotion.copies]
        promotion.transfer = self.transfers.up(promotion.pages.tolist(), buffers)

    def _advance_promotions(self) -> None:
        for promotion in [promotion for promotion in self._promotions if not promotion.is_over]:
            if promotion.reading is not None and promotion.reading.done():
                self._take_read(promotion, promotion.reading)
            if promotion.transfer is not None and promotion.transfer.done():
                self._finish_promotion(promotion, promotion.transfer)

    def _take_read(self, promotion: Promotion, reading: Future[int]) -> None:
        """Keep the pages that were read well, from the first on; the others are given back."""
        promotion.reading = None
        num_read = 0 if reading.exception() else reading.result()
        unread = promotion.copies[promotion.num_host :]
        for copy in unread[:num_read]:
            copy.is_whole = True
        for copy in unread[num_read:]:
            self.host.abandon(copy)
        promotion.has_failed = num_read < len(unread)
        self.counts.failed += len(unread) - num_read
        self._shorten(promotion, len(promotion.copies) - (len(unread) - num_read))
        promotion.num_disk = num_read
        self._copy_up(promotion)

    def _shorten(self, promotion: Promotion, num_pages: int) -> None:
        self.pool.unref(promotion.pages[num_pages:])
        promotion.pages = promotion.pages[:num_pages]
        promotion.has_tail = promotion.has_tail and num_pages == len(promotion.copies)
        promotion.copies = promotion.copies[:num_pages]
        promotion.tokens = promotion.tokens[: self._end_of(len(promotion.before), promotion.copies)]

    def _finish_promotion(self, promotion: Promotion, transfer: Transfer) -> None:
        self._let_go(promotion.copies)
        promotion.is_over, promotion.seconds = True, time.monotonic() - promotion.began_s
        if transfer.failed():
            self.counts.failed += len(promotion.copies)
            promotion.copies, promotion.num_disk, promotion.has_failed = [], 0, True
        elif promotion.copies:
            self.counts.host += promotion.num_host
            self.counts.disk += promotion.num_disk
            cost = self.disk_cost if promotion.num_disk else self.host_cost
            cost.observe(len(promotion.copies), promotion.seconds)
            self.insert(promotion)
            self._note_sources(promotion)
        self._release_unwanted(promotion)

    def _note_sources(self, promotion: Promotion) -> None:
        for index, page in enumerate(promotion.pages.tolist()):
            if self._named(page) is not None:  # else someone else's page with the same rows was there first
                self._source_of[page] = "host" if index < promotion.num_host else "disk"

    def _let_go(self, copies: Sequence[HostPage]) -> None:
        for copy in copies:
            if copy.is_whole:
                self.host.unpin(copy)
            else:
                self.host.abandon(copy)


def _read(disk: DiskTier, copies: Sequence[HostPage]) -> int:
    """How many of the pages, from the first on, were read whole."""
    for number, copy in enumerate(copies):
        if disk.read_into(copy.key, copy.buffer.data) != copy.num_bytes:
            return number
    return len(copies)
