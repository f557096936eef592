"""The one interface between the store and physical memory.

`kvstore/posix.py` implements it with a memfd and mmap, `kvstore/cuda.py` with CUDA's virtual memory calls. Everything
above it, apart from a device's kernels, is the same for both.
"""

from __future__ import annotations

from typing import Protocol

import torch

from kvstore.arrays import PageArray

DEFAULT_PAGE_BYTES = 64 * 1024
MAX_DEFAULT_PAGES = 32_768

UNMAPPED = -1  # what `mapped` says of a place with nothing
GUARD = -2  # and of one with a guard


class VirtualMemory(Protocol):
    """Physical pages, and one arena of addresses they can be mapped into, each at any number of places.

    Pages are small non-negative integers; addresses are byte offsets into the arena, multiples of `page_bytes`. What
    is mapped may be accessed after the next `settle`.
    A call that raises has changed nothing: MemoryRefused when the system says no, OutOfMappings when a mapping would
    pass `max_mappings`, ValueError for arguments that cannot be meant. Not safe to call from two threads at once.
    """

    @property
    def page_bytes(self) -> int:
        """Size of a page, a multiple of the system's own granularity."""
        ...

    @property
    def num_mappings(self) -> int:
        """Runs of addresses that the system counts as one mapping each, holes included."""
        ...

    @property
    def max_mappings(self) -> int:
        """`map` and `map_readonly` refuse to pass this many mappings."""
        ...

    @property
    def physical_bytes(self) -> int:
        """Memory the system says it holds for the created pages."""
        ...

    def reserve(self, num_bytes: int) -> None:
        """Set aside the arena's addresses; once, before anything is mapped."""
        ...

    def create(self, num_pages: int) -> list[int]:
        """Make pages of zeros; the lowest unused numbers are taken."""
        ...

    def create_guards(self) -> int:
        """Make the zeros that `map_guard` maps, once; returns how many pages of memory they take."""
        ...

    def release(self, pages: PageArray) -> None:
        """Give the memory of unmapped pages back to the system."""
        ...

    def map(self, offset: int, pages: PageArray) -> None:
        """Map pages, readable and writable, one after another from `offset`; replaces what was mapped there."""
        ...

    def map_readonly(self, offset: int, pages: PageArray) -> None:
        """As `map`, but a write through these addresses faults."""
        ...

    def map_guard(self, offset: int, num_pages: int) -> None:
        """Map zeros, read-only, for kernels that read past an end; unmapped as a whole or with all around it."""
        ...

    def unmap(self, offset: int, num_pages: int) -> None:
        """Nothing may access these addresses from now on: it faults, on a device once its queued work is done."""
        ...

    def settle(self) -> None:
        """Return when everything mapped so far can be accessed. Raises MemoryRefused; a later call tries again."""
        ...

    def mapped(self, offset: int, num_pages: int) -> PageArray:
        """The page mapped at each place, GUARD or UNMAPPED."""
        ...

    def zero(self, pages: PageArray) -> None:
        """Fill pages with zeros, mapped or not."""
        ...

    def copy(self, source: int, target: int, num_bytes: int) -> None:
        """Copy the first `num_bytes` bytes of one page to another, mapped or not."""
        ...

    def view(self, offset: int, num_bytes: int) -> torch.Tensor:
        """The addresses as a uint8 tensor [num_bytes], without a copy; only mapped parts may be touched."""
        ...

    def check_integrity(self) -> None:
        """Raise IntegrityError where the bookkeeping and the system disagree."""
        ...

    def close(self) -> None:
        """Unmap and give back everything; no view may be touched afterwards."""
        ...


def default_page_bytes(budget_bytes: int) -> int:
    """64 KiB, doubled until the budget is at most 32,768 pages: even scattered pages stay under Linux's map count."""
    page_bytes = DEFAULT_PAGE_BYTES
    while page_bytes * MAX_DEFAULT_PAGES < budget_bytes:
        page_bytes *= 2
    return page_bytes
