"""Virtual memory on Linux: a memfd is the physical memory, mmap puts its pages at addresses of the arena.

Page `i` is bytes `[i*page_bytes, (i+1)*page_bytes)` of the memfd, so pages with neighbouring numbers at neighbouring
places are one mapping and take one call. It knows pages and addresses, not tokens or sessions.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kvstore.arrays import PageArray, as_page_array
from kvstore.errors import MemoryRefused, OutOfMappings, ensure
from kvstore.linux import LinuxCalls, max_map_count
from kvstore.memory import DEFAULT_PAGE_BYTES, GUARD
from kvstore.table import READ_ONLY, Entries, PageTable

MEMFD_NAME = "kvstore-pages"
GUARD_NAME = "kvstore-guard"
MAPPINGS_SHARE = 0.8
COPY_BYTES = 1 << 20

# The next place continues the same mapping iff its entry is larger by 2, which this never is.
GUARD_ENTRY = -1

Run = tuple[int, int, int, bool]  # place, pages, first page, writable


class PosixMemory:
    """`VirtualMemory` over a memfd; `page_bytes` must be a multiple of 4,096, else ValueError.

    `max_mappings` defaults to 80 % of the system's bound, which leaves room for the rest of the process.
    """

    def __init__(
        self,
        page_bytes: int = DEFAULT_PAGE_BYTES,
        max_mappings: int | None = None,
        *,
        calls: LinuxCalls | None = None,
    ) -> None:
        granularity = os.sysconf("SC_PAGE_SIZE")
        if page_bytes <= 0 or page_bytes % granularity:
            raise ValueError(f"page_bytes={page_bytes}: must be a positive multiple of {granularity}")
        self.page_bytes = page_bytes
        self.max_mappings = int(max_map_count() * MAPPINGS_SHARE) if max_mappings is None else max_mappings
        self.num_mappings = 0
        self._calls = calls or LinuxCalls()
        self._file = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC)
        self._guard_file = os.memfd_create(GUARD_NAME, os.MFD_CLOEXEC)
        self._address: int | None = None
        self._table = PageTable(page_bytes)
        self._zeros = bytes(min(page_bytes, COPY_BYTES))

    @property
    def file(self) -> int:
        """The memfd's descriptor, for those who measure it."""
        return self._file

    @property
    def physical_bytes(self) -> int:
        """Memory the memfds hold, as the system counts it."""
        return sum(os.fstat(file).st_blocks * 512 for file in (self._file, self._guard_file))

    def reserve(self, num_bytes: int) -> None:
        """Set aside the arena; ValueError when done already or not a whole number of pages."""
        self._table.reserve(num_bytes)
        self._address = self._calls.reserve(num_bytes)
        self.num_mappings = 1

    def create(self, num_pages: int) -> list[int]:
        """Make pages of zeros, their memory allocated; the lowest unused numbers are taken."""
        pages = self._table.lowest_unused(num_pages)
        self._for_each_run(as_page_array(pages), self._allocate, undo=self._punch)
        self._table.add(pages)
        return pages

    def create_guards(self) -> int:
        """One page of zeros, to be mapped wherever guards are wanted."""
        self._calls.allocate(self._guard_file, 0, self.page_bytes)
        return 1

    def release(self, pages: PageArray) -> None:
        """Punch the pages out of the memfd; ValueError when one is mapped or was never created."""
        self._table.ensure_unmapped(pages)
        self._for_each_run(np.sort(pages), self._punch, undo=self._allocate)
        self._table.remove(pages)

    def map(self, offset: int, pages: PageArray) -> None:
        """Map pages read-write from `offset` on; all or none."""
        self._put(offset, self._table.entries_of(pages, writable=True))

    def map_readonly(self, offset: int, pages: PageArray) -> None:
        """Map pages from `offset` on; a write through these addresses is SIGSEGV. All or none."""
        self._put(offset, self._table.entries_of(pages, writable=False))

    def map_guard(self, offset: int, num_pages: int) -> None:
        """Map the one guard page at each of these places; a write is SIGSEGV. All or none."""
        self._put(offset, np.full(num_pages, GUARD_ENTRY, np.int64))

    def unmap(self, offset: int, num_pages: int) -> None:
        """Leave a hole: any access is SIGSEGV."""
        self._put(offset, np.zeros(num_pages, np.int64))

    def settle(self) -> None:
        """Nothing is left to do: mmap has returned."""

    def mapped(self, offset: int, num_pages: int) -> PageArray:
        """The page at each place, GUARD or UNMAPPED."""
        return self._table.mapped(offset, num_pages)

    def zero(self, pages: PageArray) -> None:
        """Fill pages with zeros through the file, wherever they are mapped."""
        self._table.counts_of(pages)
        for page in pages.tolist():
            for position in range(page * self.page_bytes, (page + 1) * self.page_bytes, len(self._zeros)):
                self._write(self._zeros[: (page + 1) * self.page_bytes - position], position)

    def copy(self, source: int, target: int, num_bytes: int) -> None:
        """Copy the first bytes of a page to another, through the file."""
        self._table.counts_of(as_page_array([source, target]))
        if not 0 <= num_bytes <= self.page_bytes:
            raise ValueError(f"copy of {num_bytes} bytes: a page has {self.page_bytes}")
        for start in range(0, num_bytes, COPY_BYTES):
            size = min(COPY_BYTES, num_bytes - start)
            self._write(os.pread(self._file, size, source * self.page_bytes + start), target * self.page_bytes + start)

    def view(self, offset: int, num_bytes: int) -> torch.Tensor:
        """Addresses of the arena as uint8 [num_bytes]."""
        self._table.ensure_inside(offset, num_bytes)
        assert self._address is not None
        memory = (ctypes.c_uint8 * num_bytes).from_address(self._address + offset)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def check_integrity(self) -> None:
        """Compare counters with the table, and the table with what Linux says is mapped."""
        table = self._table.touched
        ensure(self.num_mappings == int(self._address is not None) + _breaks(table), "mappings miscounted")
        self._table.check_integrity()
        if self._address is not None:
            ensure(self._runs_in_system() == self._runs_in_table(), "the arena is not mapped as the table says")

    def close(self) -> None:
        """Give back addresses and memory; idempotent. Views must not be touched afterwards."""
        if self._address is not None:
            self._calls.munmap(self._address, self._table.arena_bytes)
            self._address = None
        if self._file >= 0:
            os.close(self._file)
            os.close(self._guard_file)
            self._file = self._guard_file = -1

    def _put(self, offset: int, entries: Entries) -> None:
        """Make the system and the table agree on new entries; what was there comes back when a call fails."""
        places = self._table.places(offset, len(entries))
        num_mappings = self.num_mappings + self._change(places, entries)
        if num_mappings > max(self.max_mappings, self.num_mappings) and entries.any():
            raise OutOfMappings(num_mappings, self.max_mappings)
        self._apply(places.start, entries, fallback=self._table.entries[places].copy())
        self._table.put(places, entries)
        self.num_mappings = num_mappings

    def _apply(self, place: int, entries: Entries, *, fallback: Entries | None) -> None:
        for start, stop in _runs(entries):
            try:
                self._map_run(place + start, int(entries[start]), stop - start)
            except MemoryRefused:
                if fallback is not None:  # without one this call is itself the way back
                    self._apply(place, fallback[:stop], fallback=None)
                raise

    def _map_run(self, place: int, entry: int, num_pages: int) -> None:
        assert self._address is not None
        address, num_bytes = self._address + place * self.page_bytes, num_pages * self.page_bytes
        if entry == 0:
            self._calls.hide(address, num_bytes)
        elif entry == GUARD_ENTRY:
            self._calls.map_file(address, num_bytes, self._guard_file, 0, writable=False)
        else:
            offset = (entry // 2 - 1) * self.page_bytes
            self._calls.map_file(address, num_bytes, self._file, offset, writable=not entry & READ_ONLY)

    def _change(self, places: slice, entries: Entries) -> int:
        """How many mappings more there are once `entries` stand at `places`."""
        start = max(0, places.start - 1)
        around = self._table.entries[start : places.stop + 1].copy()
        before = _breaks(around)
        around[places.start - start : places.stop - start] = entries
        return _breaks(around) - before

    def _for_each_run(self, pages: PageArray, do: Callable[[int, int], None], undo: Callable[[int, int], None]) -> None:
        """Call `do(page, num_pages)` for each run of neighbouring pages; `undo` those done when one fails."""
        done: list[tuple[int, int]] = []
        try:
            for start, stop in _runs((pages + 1) * 2):
                do(int(pages[start]), stop - start)
                done.append((int(pages[start]), stop - start))
        except MemoryRefused:
            for run in done:
                undo(*run)
            raise

    def _allocate(self, page: int, num_pages: int) -> None:
        self._calls.allocate(self._file, page * self.page_bytes, num_pages * self.page_bytes)

    def _punch(self, page: int, num_pages: int) -> None:
        self._calls.punch(self._file, page * self.page_bytes, num_pages * self.page_bytes)

    def _write(self, data: bytes, position: int) -> None:
        if os.pwrite(self._file, data, position) != len(data):
            raise MemoryRefused("pwrite", f"{len(data)} bytes at {position} were not all written")

    def _runs_in_table(self) -> list[Run]:
        table = self._table.touched
        return [
            (start, stop - start, _first_page(int(table[start])), table[start] > 0 and not table[start] & READ_ONLY)
            for start, stop in _runs(table)
            if table[start]
        ]

    def _runs_in_system(self) -> list[Run]:
        assert self._address is not None
        runs = []
        lines = Path("/proc/self/maps").read_text().splitlines()
        for line in (line for line in lines if MEMFD_NAME in line or GUARD_NAME in line):
            addresses, protection, offset, *_ = line.split(maxsplit=3)
            start, stop = (int(address, 16) - self._address for address in addresses.split("-"))
            if 0 <= start < self._table.arena_bytes and protection.startswith("r"):
                place, num_pages = start // self.page_bytes, (stop - start) // self.page_bytes
                page = GUARD if GUARD_NAME in line else int(offset, 16) // self.page_bytes
                runs.append((place, num_pages, page, protection[1] == "w"))
        return runs


def _first_page(entry: int) -> int:
    return GUARD if entry == GUARD_ENTRY else entry // 2 - 1


def _splits(entries: Entries) -> npt.NDArray[np.bool_]:
    """Between which neighbours a mapping ends: [n-1] for n entries."""
    left, right = entries[:-1], entries[1:]
    expected = np.where(left == 0, 0, left + 2)
    splits: npt.NDArray[np.bool_] = right != expected
    return splits


def _breaks(entries: Entries) -> int:
    return int(np.count_nonzero(_splits(entries)))


def _runs(entries: Entries) -> Iterator[tuple[int, int]]:
    """The maximal [start, stop) that one call can map."""
    if len(entries):
        inner = (np.flatnonzero(_splits(entries)) + 1).tolist()
        yield from pairwise([0, *inner, len(entries)])
