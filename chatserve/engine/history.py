"""Which token ids the engine remembers of each session, so that a turn need send only its new ones."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from typing import TypeAlias

MAX_REMEMBERED_TOKENS = 64_000_000  # four bytes each
TokenIds: TypeAlias = "array[int]"  # of type code "i": 32 bits, so that a long history is moved in microseconds


def history_hash(token_ids: TokenIds) -> bytes:
    """16 bytes that both processes compute over the ids of a history, as 32-bit little-endian integers."""
    return hashlib.blake2b(token_ids, digest_size=16).digest()


class HistoryTable:
    """Token ids by session, the least recently used forgotten above `max_tokens`; the front end can always resend."""

    def __init__(self, max_tokens: int = MAX_REMEMBERED_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._by_session: OrderedDict[str, TokenIds] = OrderedDict()

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._by_session

    def prefix(self, session_id: str, num_tokens: int, expected_hash: bytes) -> TokenIds | None:
        """A copy of the session's first `num_tokens` ids, or None when they are not held or hash differently."""
        held = self._by_session.get(session_id)
        if held is None or len(held) < num_tokens:
            return None
        ids = held[:num_tokens]
        return ids if history_hash(ids) == expected_hash else None

    def held(self, session_id: str) -> TokenIds | None:
        """What is held of a session, for nobody to change."""
        return self._by_session.get(session_id)

    def remember(self, session_id: str, token_ids: TokenIds) -> None:
        """Keep these, which nobody changes any more, as the session's ids, in place of what was held."""
        self.forget(session_id)
        self._by_session[session_id] = token_ids
        self._num_tokens += len(token_ids)
        while self._num_tokens > self._max_tokens:
            self.forget(next(iter(self._by_session)))

    def forget(self, session_id: str) -> None:
        """Drop the session, if it is held."""
        self._num_tokens -= len(self._by_session.pop(session_id, ()))
