"""One session's range of addresses seen as a tensor that grows: which pages are mapped where, and how many rows count.

It maps and unmaps pages that are given to it; whose they are and who else holds them it does not know.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvstore.arrays import GrowingArray, PageArray, as_page_array
from kvstore.errors import KVError, ensure
from kvstore.layout import KVLayout
from kvstore.memory import GUARD, UNMAPPED, VirtualMemory


class VirtualTensor:
    """Rows `[num_tokens, ...]` from byte `offset` of the arena on, contiguous whatever pages they lie in.

    `range_pages` bounds its addresses. `guard` maps zeros after the last page, for kernels that read past the end of
    the rows; whatever maps or unmaps pages takes them away. A method that raises has changed nothing else.
    """

    def __init__(self, memory: VirtualMemory, layout: KVLayout, offset: int, range_pages: int) -> None:
        self.offset = offset
        self.num_tokens = 0
        self.pages: GrowingArray[np.int64] = GrowingArray([], np.int64)
        self._memory = memory
        self._layout = layout
        self._range_pages = range_pages
        self._num_guarded = 0  # places after the last page that are mapped to guards

    @property
    def capacity_tokens(self) -> int:
        """Tokens whose rows lie wholly in mapped pages."""
        return self._layout.complete_tokens(len(self.pages))

    @property
    def complete_pages(self) -> int:
        """Leading pages in which no row is still to be written."""
        return self._layout.complete_pages(self.num_tokens)

    @property
    def num_runs(self) -> int:
        """Runs of pages with neighbouring numbers: calls it takes to map them anew."""
        pages = self.pages.view
        return int(np.count_nonzero(np.diff(pages) != 1)) + 1 if len(pages) else 0

    def extend(self, pages: PageArray) -> None:
        """Map pages, writable, right after the last one."""
        self._append(pages, self._memory.map)

    def borrow(self, pages: PageArray) -> None:
        """Map someone else's pages, read-only, right after the last one."""
        self._append(pages, self._memory.map_readonly)

    def replace(self, index: int, pages: PageArray) -> None:
        """Map other pages with the same rows, read-only, in the place of those from `index` on."""
        self._memory.map_readonly(self._place(index), pages)
        self.pages.view[index : index + len(pages)] = pages

    def truncate(self, num_tokens: int) -> None:
        """Keep the rows of the first `num_tokens` tokens, and the pages that they touch."""
        self.cut(self._layout.pages_for(num_tokens))
        self.num_tokens = min(self.num_tokens, num_tokens)

    def cut(self, num_pages: int) -> None:
        """Unmap all but the first `num_pages` pages; only tokens wholly inside these count from now on."""
        surplus = len(self.pages) - num_pages
        if surplus <= 0:
            self.unguard()
            return
        self._memory.unmap(self._place(num_pages), surplus + self._num_guarded)
        self._num_guarded = 0
        self.pages.truncate(num_pages)
        self.num_tokens = min(self.num_tokens, self.capacity_tokens)

    def guard(self, num_pages: int) -> None:
        """See to it that the first `num_pages` places of the range, as far as it has so many, can be read."""
        start, stop = len(self.pages) + self._num_guarded, min(num_pages, self._range_pages)
        if stop > start:
            self._memory.map_guard(self._place(start), stop - start)
            self._num_guarded += stop - start

    def unguard(self) -> None:
        """Take the guards away, if there are any."""
        if self._num_guarded:
            self._memory.unmap(self._place(len(self.pages)), self._num_guarded)
            self._num_guarded = 0

    def fork(self, offset: int, num_tokens: int, boundary_page: int | None = None) -> VirtualTensor:
        """A tensor at `offset` with the same first `num_tokens` tokens: complete pages shared, read-only there.

        `boundary_page`, a page of zeros, takes a copy of the rows after them. ValueError when it is missing or too
        much, or when there are fewer tokens than that.
        """
        num_bytes = self._layout.boundary_bytes(num_tokens)
        if num_tokens > self.num_tokens or bool(num_bytes) != (boundary_page is not None):
            raise ValueError(
                f"fork of {num_tokens} of {self.num_tokens} tokens: {num_bytes} bytes need a boundary page"
            )
        fork = VirtualTensor(self._memory, self._layout, offset, self._range_pages)
        shared = self.pages.view[: self._layout.complete_pages(num_tokens)]
        if len(shared):
            fork.borrow(shared)
        if boundary_page is not None:
            fork._copy_or_clear(int(self.pages.view[len(shared)]), boundary_page, num_bytes)
        fork.num_tokens = num_tokens
        return fork

    def check_integrity(self) -> None:
        """Raise IntegrityError unless exactly the listed pages, then guards, then nothing, are mapped in the range."""
        expected = np.full(self._range_pages, UNMAPPED, np.int64)
        expected[: len(self.pages)] = self.pages.view
        expected[len(self.pages) : len(self.pages) + self._num_guarded] = GUARD
        mapped = self._memory.mapped(self.offset, self._range_pages)
        ensure(bool((mapped == expected).all()), f"the range at {self.offset} is not mapped as its tensor says")
        ensure(self.num_tokens <= self.capacity_tokens, "a tensor counts tokens beyond its pages")

    def _append(self, pages: PageArray, map_at: Callable[[int, PageArray], None]) -> None:
        count, end = len(self.pages), len(self.pages) + len(pages)
        if end > self._range_pages:
            raise ValueError(f"{len(pages)} more pages after {count}: the range has {self._range_pages}")
        self.unguard()
        map_at(self._place(count), pages)
        self.pages.extend(pages)

    def _copy_or_clear(self, source: int, target: int, num_bytes: int) -> None:
        try:
            self._memory.copy(source, target, num_bytes)
            self.extend(as_page_array([target]))
        except KVError:
            self.cut(0)
            raise

    def _place(self, index: int) -> int:
        return self.offset + index * self._layout.page_bytes
