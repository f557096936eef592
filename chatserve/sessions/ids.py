"""Names of sessions, messages and responses: URL-safe, unguessable, sorting by the time they were made."""

from __future__ import annotations

import secrets

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's: no letters that are mistaken for one another
_TIME_CHARS = 10
_RANDOM_CHARS = 16
MAX_EPOCH = 1 << 48  # leaves room to count up within what JavaScript holds exactly


def new_id(prefix: str, now_ms: int) -> str:
    """`prefix_` and a ULID: 50 bits of milliseconds, 80 random bits."""
    return f"{prefix}_{_base32(now_ms, _TIME_CHARS)}{_base32(secrets.randbits(80), _RANDOM_CHARS)}"


def new_epoch() -> int:
    """A random epoch, so that a cursor into a log that is gone is not mistaken for one into its successor."""
    return secrets.randbelow(MAX_EPOCH) + 1


def _base32(value: int, num_chars: int) -> str:
    return "".join(_ALPHABET[(value >> (5 * position)) & 31] for position in reversed(range(num_chars)))
