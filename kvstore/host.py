"""The host tier: copies of pages in main memory, by key, the least recently used forgotten when there is no room.

Copies come and go in other threads, so a slot is reserved first, filled meanwhile, and found by its key from then on.
It knows keys and bytes, no tokens, no device, and not who copies.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from kvstore.buffers import Buffer, Buffers
from kvstore.errors import ensure


@dataclass(eq=False, slots=True)
class HostPage:
    """A page's bytes: the first `num_bytes` of `buffer` [page_bytes]. `pins` copies are being made from it or to it."""

    key: bytes
    buffer: Buffer
    num_bytes: int
    pins: int = 0
    is_whole: bool = False

    @property
    def rows(self) -> Buffer:
        """The part of the buffer that counts, uint8 [num_bytes]."""
        return self.buffer[: self.num_bytes]


class HostTier:
    """As many pages as there are buffers. Single-threaded, except that buffers are written elsewhere."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._pages: OrderedDict[bytes, HostPage] = OrderedDict()  # least recently used first
        self._spare: list[Buffer] = []
        self._num_taken = 0
        self.evicted_bytes = 0  # of pages forgotten to make room

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def num_slots(self) -> int:
        """Pages that there may be."""
        return self._buffers.num_slots

    def __contains__(self, key: bytes) -> bool:
        page = self._pages.get(key)
        return page is not None and page.is_whole

    def reserve(self, key: bytes, num_bytes: int) -> HostPage | None:
        """A pinned page to be filled; None when the key is known, or no buffer is to be had now."""
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

    def forget(self, key: bytes) -> bool:
        """Let go of the page, if there is one; False while somebody holds it."""
        page = self._pages.get(key)
        if page is not None and page.pins:
            return False
        if page is not None:
            self.abandon(page)
        return True

    def close(self) -> None:
        """Give the buffers back."""
        self._buffers.close()

    def check_integrity(self) -> None:
        """Raise IntegrityError where pages and buffers contradict each other."""
        ensure(len(self._pages) + len(self._spare) == self._num_taken, "a host buffer is lost")
        ensure(self._num_taken <= self.num_slots, "the host tier holds more than its budget")
        ensure(len({id(page.buffer) for page in self._pages.values()}) == len(self._pages), "a host buffer is shared")
        for key, page in self._pages.items():
            ensure(page.key == key and page.pins >= 0, "a host page is held wrongly")
            ensure(page.is_whole or page.pins > 0, "a host page is neither there nor on its way")

    def _take_buffer(self) -> Buffer | None:
        if self._spare:
            return self._spare.pop()
        if self._num_taken < self.num_slots:
            buffer = self._buffers.take()
            self._num_taken += buffer is not None
            return buffer
        oldest = next((page for page in self._pages.values() if not page.pins), None)
        if oldest is None:
            return None
        del self._pages[oldest.key]
        self.evicted_bytes += oldest.num_bytes
        return oldest.buffer
