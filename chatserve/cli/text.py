"""Text of others made fit for a terminal."""

from __future__ import annotations

import unicodedata
from datetime import datetime

_KEPT = frozenset("\n\t")


def printable(text: str) -> str:
    """The text without control characters: a reply or a title must not move the cursor or recolour the screen."""
    return "".join(char for char in text if char in _KEPT or unicodedata.category(char) != "Cc")


def one_line(text: str, max_chars: int) -> str:
    """The text on one line, cut to a length."""
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= max_chars else flat[: max_chars - 1] + "…"


def local_time(timestamp_ms: int) -> str:
    """A time in milliseconds as people read it."""
    return datetime.fromtimestamp(timestamp_ms / 1000).strftime("%Y-%m-%d %H:%M")
