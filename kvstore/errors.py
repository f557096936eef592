"""What can go wrong in the store: one class per party who must act, the facts in attributes.

`OutOfPages` and its two subclasses mean "not now": wait for a lease to be released, or preempt one.
"""

from __future__ import annotations


class KVError(Exception):
    """Base of everything this package raises on purpose, apart from ValueError for impossible arguments."""


class OutOfPages(KVError):
    """Fewer pages can be had than were asked for, with everything evictable counted; nothing was changed."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(needed, available)
        self.needed = needed
        self.available = available

    def __str__(self) -> str:
        return f"{self.needed} pages needed, {self.available} can be had; release a lease or raise the budget"


class OutOfRanges(OutOfPages):
    """Every address range belongs to a leased session; wait for a release or raise `max_ranges`."""

    def __init__(self, max_ranges: int) -> None:
        super().__init__(1, 0)
        self.max_ranges = max_ranges

    def __str__(self) -> str:
        return f"all {self.max_ranges} ranges are leased; release a lease or raise max_ranges"


class OutOfMappings(OutOfPages):
    """The system's bound on mappings of one process would be passed; `needed` and `available` count mappings."""

    def __str__(self) -> str:
        return (
            f"{self.needed} mappings needed, {self.available} allowed; unmap idle sessions, "
            "use larger pages (page_bytes), or raise vm.max_map_count"
        )


class MemoryRefused(KVError):
    """The operating system or driver refused a memory call; the call's effects were rolled back."""

    def __init__(self, call: str, reason: str) -> None:
        super().__init__(call, reason)
        self.call = call
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.call} was refused: {self.reason}"


class CudaFault(KVError):
    """The device's context is gone, and all its memory with it: end the process and start another."""

    def __init__(self, call: str, reason: str) -> None:
        super().__init__(call, reason)
        self.call = call
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.call} failed: {self.reason}; the CUDA context is lost, restart the process"


class LeaseHeld(KVError):
    """The session is leased already; release that lease first."""

    def __init__(self, session_id: str) -> None:
        super().__init__(session_id)
        self.session_id = session_id

    def __str__(self) -> str:
        return f"session {self.session_id!r} is leased; release its lease first"


class IntegrityError(KVError):
    """Bookkeeping contradicts itself: a bug in this package. Reported, never a reason to end a serving process."""


def ensure(condition: bool, message: str) -> None:
    """Raise IntegrityError with `message` unless `condition` holds."""
    if not condition:
        raise IntegrityError(message)
