"""Virtual memory on Linux: a memfd is the physical memory, mmap puts its pages at addresses of the arena.

Page `i` is bytes `[i*page_bytes, (i+1)*page_bytes)` of the memfd, so pages with neighbouring numbers at neighbouring
places are one mapping and take one call. It knows pages and addresses, not tokens or sessions.
"""

from __future__ import annotations

import ctypes
import heapq
import mmap
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kvstore.arrays import PageArray, as_page_array
from kvstore.errors import MemoryRefused, OutOfMappings, ensure
from kvstore.linux import MAP_NORESERVE, LinuxCalls, max_map_count
from kvstore.memory import DEFAULT_PAGE_BYTES, UNMAPPED

MEMFD_NAME = "kvstore-pages"
MAPPINGS_SHARE = 0.8
COPY_BYTES = 1 << 20

# What the table holds for one place of the arena: 0 for nothing, else (page + 1) * 2, plus 1 when read-only.
# The next place continues the same mapping iff its entry is larger by 2.
Entries = npt.NDArray[np.int64]
READ_ONLY = 1

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
        self._address: int | None = None
        self._table: Entries = np.zeros(0, np.int64)
        self._map_counts = np.zeros(0, np.int32)  # addresses of each page number; -1: no such page
        self._num_touched = 0  # places of the arena, from its start, beyond which nothing was ever mapped
        self._unused: list[int] = []  # heap of released page numbers
        self._zeros = bytes(min(page_bytes, COPY_BYTES))

    @property
    def file(self) -> int:
        """The memfd's descriptor, for those who measure it."""
        return self._file

    @property
    def physical_bytes(self) -> int:
        """Memory the memfd holds, as the system counts it."""
        return os.fstat(self._file).st_blocks * 512

    def reserve(self, num_bytes: int) -> None:
        """Set aside the arena; ValueError when done already or not a whole number of pages."""
        if self._address is not None or num_bytes <= 0 or num_bytes % self.page_bytes:
            raise ValueError(f"reserve({num_bytes}): one arena, a positive multiple of {self.page_bytes} bytes")
        self._address = self._calls.reserve(num_bytes)
        self._table = _sparse_zeros(num_bytes // self.page_bytes)
        self.num_mappings = 1

    def create(self, num_pages: int) -> list[int]:
        """Make pages of zeros, their memory allocated; the lowest unused numbers are taken."""
        reused = min(num_pages, len(self._unused))
        first = len(self._map_counts)
        pages = [heapq.heappop(self._unused) for _ in range(reused)]
        pages += range(first, first + num_pages - reused)
        try:
            self._for_each_run(as_page_array(pages), self._allocate, undo=self._punch)
        except MemoryRefused:
            for page in pages[:reused]:
                heapq.heappush(self._unused, page)
            raise
        self._map_counts = np.append(self._map_counts, np.zeros(num_pages - reused, np.int32))
        self._map_counts[pages] = 0
        return pages

    def release(self, pages: PageArray) -> None:
        """Punch the pages out of the memfd; ValueError when one is mapped or was never created."""
        if (self._counts_of(pages) > 0).any():
            raise ValueError("release of mapped pages: unmap them first")
        self._for_each_run(np.sort(pages), self._punch, undo=self._allocate)
        self._map_counts[pages] = -1
        for page in pages.tolist():
            heapq.heappush(self._unused, page)

    def map(self, offset: int, pages: PageArray) -> None:
        """Map pages read-write from `offset` on; all or none."""
        self._counts_of(pages)
        self._put(offset, (pages + 1) * 2)

    def map_readonly(self, offset: int, pages: PageArray) -> None:
        """Map pages from `offset` on; a write through these addresses is SIGSEGV. All or none."""
        self._counts_of(pages)
        self._put(offset, (pages + 1) * 2 + READ_ONLY)

    def unmap(self, offset: int, num_pages: int) -> None:
        """Leave a hole: any access is SIGSEGV."""
        self._put(offset, np.zeros(num_pages, np.int64))

    def mapped(self, offset: int, num_pages: int) -> PageArray:
        """The page at each place, or UNMAPPED."""
        entries = self._table[self._places(offset, num_pages)]
        return np.where(entries == 0, UNMAPPED, entries // 2 - 1)

    def zero(self, pages: PageArray) -> None:
        """Fill pages with zeros through the file, wherever they are mapped."""
        self._counts_of(pages)
        for page in pages.tolist():
            for position in range(page * self.page_bytes, (page + 1) * self.page_bytes, len(self._zeros)):
                self._write(self._zeros[: (page + 1) * self.page_bytes - position], position)

    def copy(self, source: int, target: int, num_bytes: int) -> None:
        """Copy the first bytes of a page to another, through the file."""
        self._counts_of(as_page_array([source, target]))
        if not 0 <= num_bytes <= self.page_bytes:
            raise ValueError(f"copy of {num_bytes} bytes: a page has {self.page_bytes}")
        for start in range(0, num_bytes, COPY_BYTES):
            size = min(COPY_BYTES, num_bytes - start)
            self._write(os.pread(self._file, size, source * self.page_bytes + start), target * self.page_bytes + start)

    def view(self, offset: int, num_bytes: int) -> torch.Tensor:
        """Addresses of the arena as uint8 [num_bytes]."""
        if self._address is None or offset < 0 or num_bytes <= 0 or offset + num_bytes > self._arena_bytes:
            raise ValueError(f"view({offset}, {num_bytes}): the arena has {self._arena_bytes} bytes")
        memory = (ctypes.c_uint8 * num_bytes).from_address(self._address + offset)
        return torch.frombuffer(memory, dtype=torch.uint8)

    @property
    def _arena_bytes(self) -> int:
        return len(self._table) * self.page_bytes

    def check_integrity(self) -> None:
        """Compare counters with the table, and the table with what Linux says is mapped."""
        table = self._table[: self._num_touched + 1]
        ensure(self.num_mappings == int(self._address is not None) + _breaks(table), "mappings miscounted")
        mapped = table[table > 0] // 2 - 1
        counts = np.bincount(mapped, minlength=len(self._map_counts))
        ensure(bool((counts == np.maximum(self._map_counts, 0)).all()), "a page's mappings are miscounted")
        ensure(sorted(self._unused) == np.flatnonzero(self._map_counts < 0).tolist(), "page numbers lost")
        if self._address is not None:
            ensure(self._runs_in_system() == self._runs_in_table(), "the arena is not mapped as the table says")

    def close(self) -> None:
        """Give back addresses and memory; idempotent. Views must not be touched afterwards."""
        if self._address is not None:
            self._calls.munmap(self._address, self._arena_bytes)
            self._address = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _put(self, offset: int, entries: Entries) -> None:
        """Make the system and the table agree on new entries; what was there comes back when a call fails."""
        places = self._places(offset, len(entries))
        old = self._table[places].copy()
        num_mappings = self.num_mappings + self._change(places, entries)
        if num_mappings > max(self.max_mappings, self.num_mappings) and entries.any():
            raise OutOfMappings(num_mappings, self.max_mappings)
        self._apply(places.start, entries, fallback=old)
        self._table[places] = entries
        self._num_touched = max(self._num_touched, places.stop)
        self.num_mappings = num_mappings
        self._count(old, -1)
        self._count(entries, +1)

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
            return
        offset = (entry // 2 - 1) * self.page_bytes
        self._calls.map_file(address, num_bytes, self._file, offset, writable=not entry & READ_ONLY)

    def _change(self, places: slice, entries: Entries) -> int:
        """How many mappings more there are once `entries` stand at `places`."""
        start = max(0, places.start - 1)
        around = self._table[start : places.stop + 1].copy()
        before = _breaks(around)
        around[places.start - start : places.stop - start] = entries
        return _breaks(around) - before

    def _places(self, offset: int, num_pages: int) -> slice:
        place, rest = divmod(offset, self.page_bytes)
        if rest or offset < 0 or num_pages <= 0 or place + num_pages > len(self._table):
            raise ValueError(f"{num_pages} pages at offset {offset}: not whole pages inside the arena")
        return slice(place, place + num_pages)

    def _counts_of(self, pages: PageArray) -> npt.NDArray[np.int32]:
        if len(pages) and (int(pages.min()) < 0 or int(pages.max()) >= len(self._map_counts)):
            raise ValueError(f"pages {pages.tolist()}: not all were created")
        counts = self._map_counts[pages]
        if (counts < 0).any():
            raise ValueError(f"pages {pages[counts < 0].tolist()} are not created")
        return counts

    def _count(self, entries: Entries, step: int) -> None:
        np.add.at(self._map_counts, entries[entries > 0] // 2 - 1, step)

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
        table = self._table[: self._num_touched]
        return [
            (start, stop - start, int(table[start]) // 2 - 1, not table[start] & READ_ONLY)
            for start, stop in _runs(table)
            if table[start]
        ]

    def _runs_in_system(self) -> list[Run]:
        assert self._address is not None
        runs = []
        lines = Path("/proc/self/maps").read_text().splitlines()
        for line in (line for line in lines if MEMFD_NAME in line):
            addresses, protection, offset, *_ = line.split(maxsplit=3)
            start, stop = (int(address, 16) - self._address for address in addresses.split("-"))
            if 0 <= start < self._arena_bytes and protection.startswith("r"):
                place, num_pages = start // self.page_bytes, (stop - start) // self.page_bytes
                runs.append((place, num_pages, int(offset, 16) // self.page_bytes, protection[1] == "w"))
        return runs


def _sparse_zeros(length: int) -> Entries:
    """An array whose untouched parts take no memory, nor any promise of it: arenas of terabytes have large tables."""
    memory = mmap.mmap(-1, length * 8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.int64)


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
