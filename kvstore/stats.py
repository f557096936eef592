"""What the store says about itself, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvstore.pool import PageCounts


@dataclass(frozen=True, slots=True)
class KVStats:
    """Pages by state, sizes in bytes, and counts since the store began.

    `host_bytes` and `disk_bytes` lie on the tiers below; pages went down to host memory (offloaded) and on to disk
    (written), came back from either (promoted), were forgotten there (evicted), or failed on their way. The bytes of
    what moved are those of its rows.
    `physical_bytes` is what the system says the pages hold; `num_sessions` are resident, `num_leases` of them leased.
    """

    page_bytes: int
    token_bytes: int
    budget_bytes: int
    physical_bytes: int
    pages: PageCounts
    num_sessions: int
    num_leases: int
    num_ranges: int
    num_mappings: int
    max_mappings: int
    evicted_pages: int
    evicted_tokens: int
    host_bytes: int = 0
    host_budget_bytes: int = 0
    disk_bytes: int = 0
    disk_budget_bytes: int = 0
    offloaded_pages: int = 0
    offloaded_bytes: int = 0
    written_pages: int = 0
    written_bytes: int = 0
    promoted_host_pages: int = 0
    promoted_host_bytes: int = 0
    promoted_disk_pages: int = 0
    promoted_disk_bytes: int = 0
    evicted_host_bytes: int = 0
    evicted_disk_bytes: int = 0
    failed_pages: int = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of pages that hold something: private, indexed and guard."""
        return (self.pages.created - self.pages.free) * self.page_bytes

    def as_map(self) -> dict[str, Any]:
        """All figures as a dictionary of plain values; page counts under `pages`."""
        return asdict(self) | {"held_bytes": self.held_bytes}
