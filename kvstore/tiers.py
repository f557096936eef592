"""Pages below the device: which have a copy in host memory or on disk, which are on their way down, which come back.

Pages go down in the order in which they were indexed, when the device runs short or has nothing to do; what is evicted
then is only forgotten up here. A history that is asked for again is promoted beside the running steps: read from disk,
copied up, and put in the index as if it had just been computed. Single-threaded; only bytes move elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile

from kvstore.arrays import PageArray, TokenArray
from kvstore.buffers import Buffers
from kvstore.cost import LinearCost
from kvstore.disk import DiskTier
from kvstore.errors import OutOfPages
from kvstore.host import HostPage, HostTier
from kvstore.keys import NamedPage, PageKeys
from kvstore.layout import KVLayout
from kvstore.offload import Offloads
from kvstore.pool import PagePool
from kvstore.promotion import Promotion, Promotions
from kvstore.results import Missing
from kvstore.transfer import Transfers

UNUSED_SHARE = 3 / 4  # of the device: when less can be handed out, pages go down beside the steps
PART_BATCHES = 16  # a promotion brings at most so many batches
READ_BATCHES = 4  # of which at most so many are read from disk, and one before it is known how long that takes
PATIENCE_S = 0.5  # how much longer than computing them it may take to bring rows back
NUM_DISK_THREADS = 8


@dataclass(frozen=True, slots=True)
class Below:
    """What lies below a store's device: buffers of one page each, and perhaps a disk.

    `open_disk` is given the fingerprint of records and the size of a page.
    """

    buffers: Buffers
    transfers: Transfers
    open_disk: Callable[[bytes, int], DiskTier] | None = None


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
    prefill_cost: LinearCost = field(default_factory=LinearCost)  # of tokens; observed by whoever computes them
    _key_of: dict[int, bytes] = field(default_factory=dict)  # of every complete page in the index
    _tail_of: dict[int, NamedPage] = field(default_factory=dict)  # of tails in it
    _source_of: dict[int, str] = field(default_factory=dict)  # of promoted pages, until a turn uses them
    _disk_threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(NUM_DISK_THREADS, thread_name_prefix="kvstore-disk")
    )
    offloads: Offloads = field(init=False)
    promotions: Promotions = field(init=False)

    def __post_init__(self) -> None:
        self.offloads = Offloads(
            self.pool, self.host, self.disk, self.transfers, self._disk_threads,
            page_bytes=self.layout.page_bytes, named=self._named, is_below=self._is_below,
        )  # fmt: skip
        self.promotions = Promotions(
            self.layout, self.pool, self.host, self.disk, self.transfers, self._disk_threads, self._index
        )

    @property
    def is_moving(self) -> bool:
        """Whether anything is on its way."""
        return self.offloads.is_moving or self.promotions.is_moving

    @property
    def is_busy(self) -> bool:
        """Whether `tend` has more to do soon."""
        return self.is_moving or self.offloads.is_behind

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

    def is_saved(self, page: int) -> bool:
        """Whether what the page holds lies below, or is nothing that is shared."""
        named = self._named(page)
        return named is None or self._is_below(named.key)

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

    def tend(
        self, *, idle: bool = False, busy_s: float = 0.0, is_awaited: bool = False, in_haste: bool = False
    ) -> None:
        """Take in what has arrived and send what should go; quick, once a step. `idle`: nobody needs the device.

        `busy_s`: for about so long it is busy with what it was given. `is_awaited`: somebody waits for a first token.
        `in_haste`: the disk has not to rest.
        """
        self.transfers.pace(busy_s)
        self.promotions.advance()
        is_awaited = is_awaited or self.promotions.is_moving
        self.offloads.tend(may_begin=idle or self._is_short, is_awaited=is_awaited, in_haste=in_haste)

    def promote(self, salt: bytes, tokens: TokenArray) -> Promotion | None:
        """Begin to bring back the next part of a history behind what is in the index.

        None where nothing of it lies below, or it is computed sooner. Raises OutOfPages.
        """
        if not len(self.host) and self.disk is None:
            return None
        before = self.lookup(salt, tokens)
        found = self._find_below(salt, tokens, len(before))
        first_key = found[0].key if found else self._next_key(salt, tokens, before)
        if (coming := self.promotions.find(first_key)) is not None:
            coming.num_wanted += 1
            return coming
        copies, unread = self._collect(self._worthwhile(len(before), found))
        if not copies:
            return None
        promotion = self._hold(salt, tokens, before, copies, unread)
        promotion.is_last = len(copies) == len(found)
        self.promotions.begin(promotion)
        return promotion

    def _next_key(self, salt: bytes, tokens: TokenArray, before: PageArray) -> bytes:
        """The key of the page behind these: it may be on its way up although a disk thread found it bad just now."""
        key, first = self._key_of[int(before[-1])] if len(before) else self.keys.root(salt), self.keys.first_token
        return self.keys.page(key, tokens[first(len(before)) : first(len(before) + 1)])

    def _hold(
        self, salt: bytes, tokens: TokenArray, before: PageArray, copies: list[HostPage], unread: list[int]
    ) -> Promotion:
        """Pages for these copies; they and those before them are held."""
        self.pool.ref(before)
        try:
            pages = self.allocate(len(copies))
        except OutOfPages:
            self.pool.unref(before)
            self.promotions.let_go(copies)
            raise
        end = self._end_of(len(before), copies)
        now_s = time.monotonic()
        computing_s = self._computing_s(len(before), copies) if self.prefill_cost.is_known else math.inf
        give_up_s = now_s + PATIENCE_S + computing_s
        return Promotion(salt, tokens[:end], before, pages, copies, unread, now_s, give_up_s)

    def below(self, salt: bytes, tokens: TokenArray, num_before: int) -> dict[str, int]:
        """Tokens behind the first `num_before` pages that host memory, and then the disk, would give."""
        found = self._find_below(salt, tokens, num_before)
        num_host = sum(1 for _ in takewhile(lambda page: page.key in self.host, found))
        ends = [self._rows_of(num_before, found[:count]) for count in (0, num_host, len(found))]
        return {"host": ends[1] - ends[0], "disk": ends[2] - ends[1]}

    def missing(self, salt: bytes, tokens: TokenArray, num_before: int) -> Missing:
        """Where the rows behind the first `num_before` pages are."""
        if self._find_below(salt, tokens, num_before):
            return "below"
        was_evicted = self.disk.was_evicted if self.disk is not None else None
        return "expired" if was_evicted and self._find(salt, tokens, num_before, was_evicted) else "gone"

    def restore_s(self, salt: bytes, tokens: TokenArray, num_before: int) -> float:
        """How long bringing these back would take, by what it took before; 0 for nothing."""
        return self._restoring_s(self._find_below(salt, tokens, num_before))

    def flush(self, deadline_s: float) -> bool:
        """Send down all there is, until it is there or `time.monotonic()` passes the deadline; whether it is."""
        while time.monotonic() < deadline_s:
            self.tend(idle=True, in_haste=True)
            if self.offloads.is_done and not self.is_moving:
                return True
            time.sleep(0.0005)
        return False

    def figures(self) -> dict[str, int]:
        """The tiers' part of `KVStats`."""
        counts, disk = self.promotions.counts, None if self.disk is None else self.disk.stats()
        return {
            "host_bytes": len(self.host) * self.layout.page_bytes,
            "host_budget_bytes": self.host.num_slots * self.layout.page_bytes,
            "disk_bytes": disk.file_bytes if disk else 0,
            "disk_budget_bytes": disk.budget_bytes if disk else 0,
            "offloaded_pages": self.offloads.num_offloaded,
            "offloaded_bytes": self.offloads.offloaded_bytes,
            "written_pages": self.offloads.num_written,
            "written_bytes": self.offloads.written_bytes,
            "promoted_host_pages": counts.host,
            "promoted_host_bytes": counts.host_bytes,
            "promoted_disk_pages": counts.disk,
            "promoted_disk_bytes": counts.disk_bytes,
            "evicted_host_bytes": self.host.evicted_bytes,
            "evicted_disk_bytes": disk.evicted_bytes if disk else 0,
            "failed_pages": counts.failed + self.offloads.num_failed,
        }

    def held_pages(self) -> list[PageArray]:
        """Arrays of the pages that are held for what is on its way, once for each hold."""
        return self.offloads.held_pages + self.promotions.held_pages

    def close(self) -> None:
        """Finish what is on its way and end the threads."""
        self.transfers.close()
        self._disk_threads.shutdown()
        self.host.close()
        if self.disk is not None:
            self.disk.close()

    @property
    def _is_short(self) -> bool:
        return self.pool.num_available < UNUSED_SHARE * self.pool.capacity_pages

    def _is_below(self, key: bytes) -> bool:
        return key in self.host or (self.disk is not None and self.disk.contains(key))

    def _named(self, page: int) -> NamedPage | None:
        """What the page holds, complete or not; None where it left the index."""
        key = self._key_of.get(page)
        return self._tail_of.get(page) if key is None else NamedPage(key, self.layout.page_bytes)

    def _find_below(self, salt: bytes, tokens: TokenArray, num_before: int) -> list[NamedPage]:
        """The pages behind the first ones that lie below, up to the first that does not, or a tail in its place."""
        return self._find(salt, tokens, num_before, self._is_below)

    def _find(
        self, salt: bytes, tokens: TokenArray, num_before: int, is_wanted: Callable[[bytes], bool]
    ) -> list[NamedPage]:
        """The pages behind the first ones whose keys are wanted, up to one that is not, or a tail in its place."""
        keys = self.keys.of_path(salt, tokens)
        wanted = list(takewhile(is_wanted, keys[num_before:]))
        found = [NamedPage(key, self.layout.page_bytes) for key in wanted]
        num_pages = num_before + len(wanted)
        before = keys[num_pages - 1] if num_pages else self.keys.root(salt)
        tail = self._find_tail(before, tokens, num_pages, is_wanted)
        if tail is not None and (found or self._rows_of(num_before, [tail]) > self.depth(salt, tokens)):
            found.append(tail)
        return found

    def _find_tail(
        self, before: bytes, tokens: TokenArray, num_pages: int, is_wanted: Callable[[bytes], bool]
    ) -> NamedPage | None:
        """The longest tail with a wanted key behind a path's complete pages; each length has a key of its own."""
        first = self.keys.first_token(num_pages)
        most = min(len(tokens), self.keys.first_token(num_pages + 1) - 1)
        for end in range(most, first - 1, -1):
            num_bytes = self.layout.boundary_bytes(end)
            key = self.keys.tail(before, tokens[first:end])
            if num_bytes and is_wanted(key):
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

    def _worthwhile(self, num_before: int, found: Sequence[NamedPage]) -> Sequence[NamedPage]:
        """As many of these pages, from the first on, as are brought back sooner than computed, as far as is known.

        All of them, or those before the first that has to be read from disk; at most what one promotion brings.
        """
        num_host = sum(1 for _ in takewhile(lambda page: page.key in self.host, found))
        if not self.prefill_cost.is_known:
            return found
        gain, best = 0.0, 0
        for count in (num_host, len(found)):
            part = found[:count]
            gained = self._computing_s(num_before, part) - self._restoring_s(part)
            gain, best = max((gain, best), (gained, count))
        return found[:best]

    def _computing_s(self, num_before: int, pages: Sequence[NamedPage | HostPage]) -> float:
        """How long it would take to compute the rows in these pages."""
        num_tokens = self._rows_of(num_before, pages) - self._rows_of(num_before, [])
        return self.prefill_cost.estimate(num_tokens) - self.prefill_cost.estimate(0)

    def _restoring_s(self, pages: Sequence[NamedPage]) -> float:
        """How long it would take to bring these pages back."""
        num_disk = sum(page.key not in self.host for page in pages)
        reading_s = self.promotions.disk_cost.estimate(num_disk) if num_disk else 0.0
        return reading_s + (self.promotions.host_cost.estimate(len(pages)) if pages else 0.0)

    def _collect(self, found: Sequence[NamedPage]) -> tuple[list[HostPage], list[int]]:
        """Held host pages for as many as one promotion brings and there is room for, and which of them to read."""
        batch_pages = max(1, self.transfers.batch_bytes // self.layout.page_bytes)
        most_unread = batch_pages * (READ_BATCHES if self.promotions.disk_cost.is_known else 1)
        copies: list[HostPage] = []
        unread: list[int] = []
        for page in found[: PART_BATCHES * batch_pages]:
            copy = self.host.pin(page.key)
            if copy is None and len(unread) < most_unread and (copy := self._reserve_to_read(page)) is not None:
                unread.append(len(copies))
            if copy is None:
                break
            copies.append(copy)
        return copies, unread

    def _reserve_to_read(self, page: NamedPage) -> HostPage | None:
        if self.disk is None or not self.disk.contains(page.key):
            return None
        return self.host.reserve(page.key, page.num_bytes)

    def _index(self, promotion: Promotion) -> None:
        """What has come back is in the index from now on, and whence it came is remembered."""
        self.insert(promotion)
        for number, page in enumerate(promotion.pages[: promotion.num_arrived].tolist()):
            if self._named(page) is not None:  # else someone else's page with the same rows was there first
                self._source_of[page] = "disk" if number in promotion.unread else "host"
