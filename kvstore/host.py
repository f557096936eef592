"""The host tier: copies of pages in main memory, by key, the least recently used forgotten when there is no room.

Copies come and go in other threads, so a slot is reserved first, filled meanwhile, and found by its key from then on.
It knows keys and bytes, no tokens, no device, and not who copies.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.errors import ensure

Buffer = npt.NDArray[np.uint8]


@dataclass(eq=False, slots=True)
class HostPage:
    """A page's bytes: the first `num_bytes` of `buffer` [page_bytes]. `pins` copies are being made from it or to it."""

    key: bytes
    buffer: Buffer
    num_bytes: int
    pins: int = 0
    is_whole: bool = False


class HostTier:
    """At most `budget_bytes` of pages of `page_bytes`. Single-threaded, except that buffers are written elsewhere.

    `make_buffer` gives memory for one page, pinned where a device copies from it; it is kept for the next page.
    """

    def __init__(self, budget_bytes: int, page_bytes: int, make_buffer: Callable[[], Buffer]) -> None:
        self.num_slots = budget_bytes // page_bytes
        self._make_buffer = make_buffer
        self._pages: OrderedDict[bytes, HostPage] = OrderedDict()  # least recently used first
        self._spare: list[Buffer] = []
        self._num_buffers = 0

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, key: bytes) -> bool:
        page = self._pages.get(key)
        return page is not None and page.is_whole

    def reserve(self, key: bytes, num_bytes: int) -> HostPage | None:
        """A pinned page to be filled; None when the key is known or nothing can be forgotten for it."""
        if key in self._pages or (buffer := self._take_buffer()) is None:
            return None
        page = self._pages[key] = HostPage(key, buffer, num_bytes, pins=1)
        return page

    def fill(self, page: HostPage) -> None:
        """The page's bytes have arrived: it can be found from now on."""
        page.is_whole = True
        page.pins -= 1

    def abandon(self, page: HostPage) -> None:
        """The page's bytes will not come."""
        del self._pages[page.key]
        self._spare.append(page.buffer)

    def pin(self, key: bytes) -> HostPage | None:
        """The page, held until `unpin` and used just now; None where there is none, or not yet."""
        if key not in self:
            return None
        self._pages.move_to_end(key)
        page = self._pages[key]
        page.pins += 1
        return page

    def unpin(self, page: HostPage) -> None:
        """The page may be forgotten again."""
        page.pins -= 1

    def check_integrity(self) -> None:
        """Raise IntegrityError where pages and buffers contradict each other."""
        ensure(len(self._pages) + len(self._spare) == self._num_buffers, "a host buffer is lost")
        ensure(self._num_buffers <= self.num_slots, "the host tier holds more than its budget")
        ensure(len({id(page.buffer) for page in self._pages.values()}) == len(self._pages), "a host buffer is shared")
        for key, page in self._pages.items():
            ensure(page.key == key and page.pins >= 0, "a host page is held wrongly")
            ensure(page.is_whole or page.pins > 0, "a host page is neither there nor on its way")

    def _take_buffer(self) -> Buffer | None:
        if self._spare:
            return self._spare.pop()
        if self._num_buffers < self.num_slots:
            self._num_buffers += 1
            return self._make_buffer()
        oldest = next((page for page in self._pages.values() if not page.pins), None)
        if oldest is None:
            return None
        del self._pages[oldest.key]
        return oldest.buffer
