"""One session's range of addresses seen as a tensor that grows: which pages are mapped where, and how many rows count.

It maps and unmaps pages that are given to it; whose they are and who else holds them it does not know.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvstore.arrays import GrowingArray, PageArray, as_page_array
from kvstore.errors import KVError, ensure
from kvstore.layout import KVLayout
from kvstore.memory import UNMAPPED, VirtualMemory


class VirtualTensor:
    """Rows `[num_tokens, ...]` from byte `offset` of the arena on, contiguous whatever pages they lie in.

    `range_pages` bounds its addresses. With a guard page, `guard_pages` places after the last page are kept mapped to
    it, read-only, for kernels that read past the end of the rows. A method that raises has changed nothing a reader
    could notice.
    """

    def __init__(
        self,
        memory: VirtualMemory,
        layout: KVLayout,
        offset: int,
        range_pages: int,
        *,
        guard_page: int | None = None,
        guard_pages: int = 0,
    ) -> None:
        self.offset = offset
        self.num_tokens = 0
        self.pages: GrowingArray[np.int64] = GrowingArray([], np.int64)
        self._memory = memory
        self._layout = layout
        self._range_pages = range_pages
        self._guard_page = guard_page
        self._guard_pages = guard_pages if guard_page is not None else 0
        self._num_guarded = 0  # places after the last page that are mapped to the guard page

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
        if surplus > 0:
            self._memory.unmap(self._place(num_pages), surplus + self._num_guarded)
            self._num_guarded = 0
            self.pages.truncate(num_pages)
            self.num_tokens = min(self.num_tokens, self.capacity_tokens)

    def guard(self) -> None:
        """See to it that a kernel may read past the last page, if there is one."""
        end = len(self.pages)
        if end:
            self._num_guarded += self._map_guards(end + self._num_guarded, end + self._guard_pages)

    @property
    def is_guarded(self) -> bool:
        """Whether as many guards follow the last page as there should be, or as the range has room for."""
        end = len(self.pages)
        return end == 0 or self._num_guarded >= min(self._guard_pages, self._range_pages - end)

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
        fork = VirtualTensor(
            self._memory, self._layout, offset, self._range_pages,
            guard_page=self._guard_page, guard_pages=self._guard_pages,
        )  # fmt: skip
        shared = self.pages.view[: self._layout.complete_pages(num_tokens)]
        if len(shared):
            fork.borrow(shared)
        if boundary_page is not None:
            self._memory.copy(int(self.pages.view[len(shared)]), boundary_page, num_bytes)
            fork._extend_or_clear(boundary_page)
        fork.num_tokens = num_tokens
        return fork

    def check_integrity(self) -> None:
        """Raise IntegrityError unless exactly the listed pages, then guards, then nothing, are mapped in the range."""
        expected = np.full(self._range_pages, UNMAPPED, np.int64)
        expected[: len(self.pages)] = self.pages.view
        if self._guard_page is not None:
            expected[len(self.pages) : len(self.pages) + self._num_guarded] = self._guard_page
        mapped = self._memory.mapped(self.offset, self._range_pages)
        ensure(bool((mapped == expected).all()), f"the range at {self.offset} is not mapped as its tensor says")
        ensure(self.num_tokens <= self.capacity_tokens, "a tensor counts tokens beyond its pages")

    def _append(self, pages: PageArray, map_at: Callable[[int, PageArray], None]) -> None:
        count, end = len(self.pages), len(self.pages) + len(pages)
        if end > self._range_pages:
            raise ValueError(f"{len(pages)} more pages after {count}: the range has {self._range_pages}")
        added = self._map_guards(max(count + self._num_guarded, end), end + self._guard_pages)
        try:
            map_at(self._place(count), pages)
        except KVError:
            if added:
                self._memory.unmap(self._place(max(count + self._num_guarded, end)), added)
            raise
        self.pages.extend(pages)
        self._num_guarded = max(0, count + self._num_guarded - end) + added

    def _extend_or_clear(self, page: int) -> None:
        try:
            self.extend(as_page_array([page]))
        except KVError:
            self.cut(0)
            raise

    def _map_guards(self, start: int, stop: int) -> int:
        """Map the guard page at the places [start, stop) that the range has; returns how many these are."""
        count = max(0, min(stop, self._range_pages) - start)
        if self._guard_page is None or count == 0:
            return 0
        self._memory.map_readonly(self._place(start), np.full(count, self._guard_page, np.int64))
        return count

    def _place(self, index: int) -> int:
        return self.offset + index * self._layout.page_bytes
