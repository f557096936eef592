"""What is mapped where: the books that every kind of memory keeps, whoever makes its system calls.

An entry is 0 for nothing, else `(page + 1) * 2`, plus 1 when read-only; negative for a guard. It knows numbers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kvstore.arrays import PageArray
from kvstore.errors import ensure
from kvstore.linux import sparse_zeros
from kvstore.memory import GUARD, UNMAPPED

Entries = npt.NDArray[np.int64]
READ_ONLY = 1
NO_PAGE = -1  # instead of a count: this page number is unused


class PageTable:
    """Entries by place of the arena, and by page number how often it is mapped."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.entries: Entries = np.zeros(0, np.int64)
        self._map_counts = np.zeros(0, np.int32)
        self._num_touched = 0  # places of the arena, from its start, beyond which nothing was ever mapped

    @property
    def arena_bytes(self) -> int:
        """Size of the arena; 0 before `reserve`."""
        return len(self.entries) * self.page_bytes

    @property
    def touched(self) -> Entries:
        """The entries of all places up to one past the last that ever had a mapping."""
        return self.entries[: self._num_touched + 1]

    @property
    def pages(self) -> PageArray:
        """The numbers of all pages there are."""
        return np.flatnonzero(self._map_counts >= 0)

    def reserve(self, num_bytes: int) -> None:
        """Size the arena; ValueError when that was done, or `num_bytes` is not a positive number of pages."""
        if self.arena_bytes or num_bytes <= 0 or num_bytes % self.page_bytes:
            raise ValueError(f"reserve({num_bytes}): one arena, a positive multiple of {self.page_bytes} bytes")
        self.entries = sparse_zeros(num_bytes // self.page_bytes)

    def lowest_unused(self, num_pages: int) -> list[int]:
        """The lowest page numbers that are not taken, in order."""
        reused = np.flatnonzero(self._map_counts < 0)[:num_pages].tolist()
        first = len(self._map_counts)
        return [*reused, *range(first, first + num_pages - len(reused))]

    def add(self, pages: list[int]) -> None:
        """These numbers are pages now."""
        surplus = max(pages, default=-1) + 1 - len(self._map_counts)
        if surplus > 0:
            self._map_counts = np.append(self._map_counts, np.full(surplus, NO_PAGE, np.int32))
        self._map_counts[pages] = 0

    def remove(self, pages: PageArray) -> None:
        """These numbers are unused again."""
        self._map_counts[pages] = NO_PAGE

    def counts_of(self, pages: PageArray) -> npt.NDArray[np.int32]:
        """How often each page is mapped; ValueError where there is no such page."""
        if len(pages) and (int(pages.min()) < 0 or int(pages.max()) >= len(self._map_counts)):
            raise ValueError(f"pages {pages.tolist()}: not all were created")
        counts = self._map_counts[pages]
        if (counts < 0).any():
            raise ValueError(f"pages {pages[counts < 0].tolist()} are not created")
        return counts

    def ensure_unmapped(self, pages: PageArray) -> None:
        """Raise ValueError unless all these pages exist and none is mapped anywhere."""
        if (self.counts_of(pages) > 0).any():
            raise ValueError("release of mapped pages: unmap them first")

    def entries_of(self, pages: PageArray, *, writable: bool) -> Entries:
        """What the table will hold where these pages are mapped; ValueError where there is no such page."""
        self.counts_of(pages)
        return (pages + 1) * 2 + (0 if writable else READ_ONLY)

    def places(self, offset: int, num_pages: int) -> slice:
        """The places of the arena from byte `offset` on; ValueError unless they are whole pages inside it."""
        place, rest = divmod(offset, self.page_bytes)
        if rest or offset < 0 or num_pages <= 0 or place + num_pages > len(self.entries):
            raise ValueError(f"{num_pages} pages at offset {offset}: not whole pages inside the arena")
        return slice(place, place + num_pages)

    def ensure_inside(self, offset: int, num_bytes: int) -> None:
        """Raise ValueError unless these bytes, at least one, lie in the arena."""
        if offset < 0 or num_bytes <= 0 or offset + num_bytes > self.arena_bytes:
            raise ValueError(f"view({offset}, {num_bytes}): the arena has {self.arena_bytes} bytes")

    def put(self, places: slice, entries: Entries) -> None:
        """Replace entries, and count."""
        old = self.entries[places].copy()
        self.entries[places] = entries
        self._num_touched = max(self._num_touched, places.stop)
        if old.any():  # mostly nothing was there
            self._count(old, -1)
        self._count(entries, +1)

    def mapped(self, offset: int, num_pages: int) -> PageArray:
        """The page at each place, GUARD or UNMAPPED."""
        return _pages_of(self.entries[self.places(offset, num_pages)])

    def check_integrity(self) -> None:
        """Raise IntegrityError unless each page is counted as often as it stands in the table."""
        mapped = _pages_of(self.touched)
        counts = np.bincount(mapped[mapped >= 0], minlength=len(self._map_counts))
        ensure(bool((counts == np.maximum(self._map_counts, 0)).all()), "a page's mappings are miscounted")

    def _count(self, entries: Entries, step: int) -> None:
        np.add.at(self._map_counts, entries[entries > 0] // 2 - 1, step)


def neighbours(pages: PageArray) -> Iterator[tuple[int, int]]:
    """The maximal [start, stop) in which the numbers count up by one."""
    if len(pages):
        inner = (np.flatnonzero(np.diff(pages) != 1) + 1).tolist()
        yield from pairwise([0, *inner, len(pages)])


def _pages_of(entries: Entries) -> PageArray:
    return np.where(entries < 0, GUARD, np.where(entries == 0, UNMAPPED, entries // 2 - 1))
