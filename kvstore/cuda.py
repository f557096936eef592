"""Virtual memory on a CUDA device: one handle is one page, mapped by a thread of its own.

Every page is also mapped at a *home* address, read-write, whatever the arena shows, so that zeroing and copying are
calls on the compute stream. All that the device does to pages is ordered on that stream; only unmapping waits for it on
the host (see `kvstore.mapper`). It knows pages and addresses, not tokens or sessions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from kvstore.arrays import PageArray, as_page_array
from kvstore.driver import CudaDriver
from kvstore.errors import CudaFault, KVError, MemoryRefused, ensure
from kvstore.mapper import GUARD_MIDDLES, GUARD_SIZES, Job, Mapper, guard_entries
from kvstore.table import Entries, PageTable, neighbours

DEFAULT_HOME_BYTES = 1 << 40  # addresses; several times what any device holds
DEFAULT_SPARE_PAGES = 32
MAX_MAPPINGS = 1 << 40  # the driver has no bound of its own
GUARD_PAGES = sum(GUARD_SIZES)


class CudaMemory:
    """`VirtualMemory` on `device`, whose kernels run on `stream` (a CUstream as an integer).

    `page_bytes` must be a multiple of the device's granularity, 2 MiB on those known, else ValueError. At most
    `max_pages` can be made, by default as many as have 1 TiB; `spare_pages` of them are made ahead by the thread, and
    count as physical. To be used by one thread, in which the device's primary context is current, as torch makes it.
    """

    max_mappings = MAX_MAPPINGS

    def __init__(
        self,
        page_bytes: int,
        *,
        stream: int,
        device: int = 0,
        driver: CudaDriver | None = None,
        spare_pages: int = DEFAULT_SPARE_PAGES,
        max_pages: int | None = None,
    ) -> None:
        self.page_bytes = page_bytes
        self._driver = driver or CudaDriver(device)
        self._driver.attach()
        _check_granularity(page_bytes, self._driver.granularity())
        self._stream = stream
        self._spare_pages = spare_pages
        self._max_pages = DEFAULT_HOME_BYTES // page_bytes if max_pages is None else max_pages
        self._table = PageTable(page_bytes)
        self._handles: dict[int, int] = {}  # by page, spare ones included
        self._guards: dict[int, int] = {}  # handles by number of pages
        self._spares: set[int] = set()  # pages with a handle that nobody has asked for
        self._being_made: int | None = None  # the spare page that the thread is making
        self._spares_refused = False
        self._home_bytes = (self._max_pages + GUARD_PAGES) * page_bytes
        self._home = self._driver.reserve(self._home_bytes)
        self._mapper: Mapper | None = None
        self._arena: torch.Tensor | None = None
        self._address = 0
        self._closed = False

    @property
    def num_mappings(self) -> int:
        """Places of the arena where something is mapped."""
        return int(np.count_nonzero(self._table.touched))

    @property
    def physical_bytes(self) -> int:
        """Memory of all handles: pages, spare ones, and guards."""
        return (len(self._handles) + sum(self._guards)) * self.page_bytes

    def home(self, page: int) -> int:
        """The device address at which a page can always be read and written, until it is released."""
        return self._home + page * self.page_bytes

    def reserve(self, num_bytes: int) -> None:
        """Set aside the arena; ValueError when done already or not a whole number of pages."""
        self._table.reserve(num_bytes)
        self._address = self._driver.reserve(num_bytes)
        self._arena = self._make_view(num_bytes)
        mapper = Mapper(self._driver, self._stream, self._table, self._address, self._handle_of, self._next_spare)
        self._mapper = mapper
        mapper.start()

    def create(self, num_pages: int) -> list[int]:
        """Make pages of zeros; the lowest unused numbers are taken, spare ones at once."""
        mapper = self._ready
        with mapper.changed:
            mapper.wait_until(lambda: self._being_made is None)
            pages = self._table.lowest_unused(num_pages)
            if pages and pages[-1] >= self._max_pages:
                raise MemoryRefused("create", f"{pages[-1] + 1} pages, max_pages={self._max_pages}")
            self._provide(pages)
            self._table.add(pages)
            self._spares.difference_update(pages)
            mapper.changed.notify_all()
        return pages

    def create_guards(self) -> int:
        """Zeros in handles of 4, 2 and 1 pages, so that most gaps take few calls."""
        for size in GUARD_SIZES:
            address = self.home(self._max_pages + size - 1)
            self._guards[size] = self._make(address, size * self.page_bytes)
            self._driver.zero(address, size * self.page_bytes, self._stream)
        return GUARD_PAGES

    def release(self, pages: PageArray) -> None:
        """Give pages back to the driver, once nothing on the stream or in the thread concerns them any more."""
        self._table.ensure_unmapped(pages)
        self._ready.drain()
        self._ready.synchronize()
        with self._ready.changed:
            self._for_each(pages.tolist(), self._drop_page, undo=self._make_page)
            self._table.remove(pages)
            self._spares_refused = False

    def map(self, offset: int, pages: PageArray) -> None:
        """Map pages read-write from `offset` on, in effect after `settle`."""
        self._put(offset, self._table.entries_of(pages, writable=True))

    def map_readonly(self, offset: int, pages: PageArray) -> None:
        """Map pages from `offset` on, in effect after `settle`; a write through these addresses ends the context."""
        self._put(offset, self._table.entries_of(pages, writable=False))

    def map_guard(self, offset: int, num_pages: int) -> None:
        """Map zeros, read-only: one mapping for every 4 pages, and at most two for the rest."""
        sizes = [4] * (num_pages // 4) + [size for size in (2, 1) if num_pages % 4 & size]
        self._put(offset, np.concatenate([np.zeros(0, np.int64), *map(guard_entries, sizes)]))

    def unmap(self, offset: int, num_pages: int) -> None:
        """Leave a hole; work that is queued on the stream still finds what was there."""
        self._put(offset, np.zeros(num_pages, np.int64))

    def settle(self) -> None:
        """Return when all that was mapped can be accessed."""
        self._ready.settle()

    def mapped(self, offset: int, num_pages: int) -> PageArray:
        """The page at each place, GUARD or UNMAPPED."""
        return self._table.mapped(offset, num_pages)

    def zero(self, pages: PageArray) -> None:
        """Fill pages with zeros, in the stream's order; neighbours in one call."""
        self._table.counts_of(pages)
        self._zero(pages)

    def copy(self, source: int, target: int, num_bytes: int) -> None:
        """Copy the first bytes of a page to another, in the stream's order."""
        self._table.counts_of(as_page_array([source, target]))
        if not 0 <= num_bytes <= self.page_bytes:
            raise ValueError(f"copy of {num_bytes} bytes: a page has {self.page_bytes}")
        if num_bytes:
            self._driver.copy(self.home(source), self.home(target), num_bytes, self._stream)

    def view(self, offset: int, num_bytes: int) -> torch.Tensor:
        """Addresses of the arena as uint8 [num_bytes] on the device."""
        self._table.ensure_inside(offset, num_bytes)
        assert self._arena is not None
        return self._arena[offset : offset + num_bytes]

    def check_integrity(self) -> None:
        """Compare handles with the table, and the table with what is mapped once the thread has done its work."""
        self._table.check_integrity()
        pages = set(self._table.pages.tolist())
        with self._ready.changed:
            ensure(not pages & self._spares, "a page is spare and in use")
            ensure(self._handles.keys() == pages | self._spares, "a handle is lost")
        with contextlib.suppress(MemoryRefused):
            self._ready.settle()
        with contextlib.suppress(MemoryRefused):
            self._ready.drain()
        ensure(not len(self._ready.unsettled()), "the arena is not mapped as the table says")

    def close(self) -> None:
        """End the thread and give everything back; idempotent. Where the context is gone there is nothing to give."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(CudaFault):
                self._give_back()

    @property
    def _ready(self) -> Mapper:
        if self._mapper is None:
            raise ValueError("reserve the arena first")
        return self._mapper

    def _put(self, offset: int, entries: Entries) -> None:
        places = self._table.places(offset, len(entries))
        self._ensure_whole_guards(places)
        self._ready.change(places, entries)

    def _ensure_whole_guards(self, places: slice) -> None:
        """A guard's mapping cannot be divided: the first one must begin here, the last one end here."""
        first = int(self._table.entries[places.start])
        behind = self._table.entries[places.stop : places.stop + 1].tolist()
        if first in GUARD_MIDDLES or (behind and behind[0] in GUARD_MIDDLES):
            raise ValueError(f"places {places.start} to {places.stop} hold part of a guard: unmap it as a whole")

    def _make_view(self, num_bytes: int) -> torch.Tensor:
        """One tensor for the whole arena; its first page is there meanwhile, because torch asks what an address is."""
        handle = self._make(self._address, self.page_bytes)
        try:
            return self._driver.tensor(self._address, num_bytes)
        finally:
            self._driver.unmap(self._address, self.page_bytes)
            self._driver.release(handle)

    def _provide(self, pages: list[int]) -> None:
        """Make these pages, all or none, of zeros; spare ones are there, or are given up for what the device lacks."""
        missing = [page for page in pages if page not in self._handles]
        try:
            self._for_each(missing, self._make_page, undo=self._drop_page)
        except MemoryRefused:
            if not self._spares:
                raise
            self._for_each(sorted(self._spares), self._drop_spare, undo=self._make_page)
            self._spares_refused = True
            self._provide(pages)
            return
        self._zero_new(pages, missing)

    def _zero_new(self, pages: list[int], made: list[int]) -> None:
        try:
            self._zero(as_page_array(pages))
        except MemoryRefused:
            for page in made:
                self._drop_page(page)
            raise

    def _zero(self, pages: PageArray) -> None:
        for start, stop in neighbours(pages):
            num_bytes = (stop - start) * self.page_bytes
            self._driver.zero(self.home(int(pages[start])), num_bytes, self._stream)

    def _for_each(self, pages: list[int], do: Callable[[int], None], undo: Callable[[int], None]) -> None:
        """Call `do` for each page; `undo` those done when one fails."""
        for number, page in enumerate(pages):
            try:
                do(page)
            except MemoryRefused:
                for done in pages[:number]:
                    undo(done)
                raise

    def _make_page(self, page: int) -> None:
        self._handles[page] = self._make(self.home(page), self.page_bytes)

    def _make(self, address: int, num_bytes: int) -> int:
        """A new handle, mapped read-write at an address."""
        handle = self._driver.create(num_bytes)
        try:
            self._map(address, num_bytes, handle)
        except KVError:
            self._driver.release(handle)
            raise
        return handle

    def _map(self, address: int, num_bytes: int, handle: int) -> None:
        self._driver.map(address, num_bytes, handle)
        try:
            self._driver.set_access(address, num_bytes, writable=True)
        except KVError:
            self._driver.unmap(address, num_bytes)
            raise

    def _drop_page(self, page: int) -> None:
        handle = self._handles[page]
        self._driver.unmap(self.home(page), self.page_bytes)
        try:
            self._driver.release(handle)
        except MemoryRefused:
            self._map(self.home(page), self.page_bytes, handle)
            raise
        del self._handles[page]

    def _drop_spare(self, page: int) -> None:
        self._drop_page(page)
        self._spares.discard(page)

    def _handle_of(self, entry: int) -> int:
        """The handle that an entry of the table means, the first of its guard if it is one."""
        return self._guards[-entry] if entry < 0 else self._handles[entry // 2 - 1]

    def _next_spare(self) -> Job | None:
        """With the mapper's lock held: how to make the next spare page, if one is wanted."""
        if self._spares_refused or len(self._spares) >= self._spare_pages:
            return None
        unused = self._table.lowest_unused(len(self._spares) + 1)
        page = next(page for page in unused if page not in self._spares)
        if page >= self._max_pages:
            return None
        self._being_made = page
        return partial(self._make_spare, page)

    def _make_spare(self, page: int) -> None:
        handle = None
        with contextlib.suppress(MemoryRefused):
            handle = self._make(self.home(page), self.page_bytes)
        with self._ready.changed:
            self._being_made = None
            self._spares_refused = handle is None
            if handle is not None:
                self._handles[page] = handle
                self._spares.add(page)
            self._ready.changed.notify_all()

    def _give_back(self) -> None:
        if self._mapper is not None:
            self._mapper.close()
            self._driver.address_free(self._address, self._table.arena_bytes)
        for page in list(self._handles):
            self._drop_page(page)
        for size, handle in self._guards.items():
            self._driver.unmap(self.home(self._max_pages + size - 1), size * self.page_bytes)
            self._driver.release(handle)
        self._driver.address_free(self._home, self._home_bytes)
        self._driver.close()


def _check_granularity(page_bytes: int, granularity: int) -> None:
    if page_bytes <= 0 or page_bytes % granularity:
        larger = max(1, -(-page_bytes // granularity)) * granularity
        raise ValueError(f"page_bytes={page_bytes}: must be a multiple of {granularity} on this device; use {larger}")
