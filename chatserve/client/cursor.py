"""The client's place in the log of a session it follows: what to apply, what to drop, when something is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["apply", "drop", "gap"]


@dataclass(slots=True)
class Cursor:
    """The last event of a session that was applied, within one epoch of its log."""

    epoch: int
    seq: int

    def judge(self, event: Mapping[str, Any]) -> Verdict:
        """Whether an event is the next one; if it is, the cursor moves behind it."""
        seq: int = event["seq"]
        if seq <= self.seq:
            return "drop"
        if event.get("seq_from", seq) != self.seq + 1:
            return "gap"
        self.seq = seq
        return "apply"
