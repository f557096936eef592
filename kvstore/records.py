"""What eviction may know about sessions: the interface to their records, wherever these are kept.

The store reads records and never writes them; who keeps them, and how, is outside this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """One session as its owner last described it. Times are seconds since the epoch.

    `think_time_s` is the average pause between a reply and the person's next turn; `priority` is higher for sessions
    to keep; `pinned` ones are evicted last; `owner` names the process that writes the record.
    """

    session_id: str
    last_activity_s: float
    turns: int
    tokens: int
    think_time_s: float
    connected: bool
    typing: bool
    priority: int
    pinned: bool
    owner: str


class SessionRecords(Protocol):
    """Where records are read. May block; never called on a step's path."""

    def changed_since(self, time_s: float) -> list[SessionRecord]:
        """Records written at or after `time_s`, oldest change first. Raises OSError where they cannot be read now."""
        ...
