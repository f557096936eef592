"""Histories that are brought back before their turn comes, because it is likely to: part by part, beside the steps.

It knows sessions' tokens and the store; who says that a turn is likely is the front end's business.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore import KVStore, OutOfPages
from kvstore.arrays import TokenArray
from kvstore.promotion import Failure, Promotion

MAX_FAILURES = 1024


@dataclass(frozen=True, slots=True)
class _History:
    session_id: str
    salt: bytes
    tokens: TokenArray
    promotion: Promotion


class Warming:
    """The histories on their way. What has come is left in the index, where the turn finds it, or it is evicted."""

    def __init__(self, store: KVStore) -> None:
        self._store = store
        self._histories: list[_History] = []
        self._failures: dict[str, Failure] = {}  # by session, the oldest forgotten

    def begin(self, session_id: str, salt: bytes, tokens: TokenArray) -> None:
        """Bring this history back, as far as it lies below and there is room."""
        try:
            promotion = self._store.promote(session_id, salt, tokens)
        except OutOfPages:  # those whose turn has come need it more
            return
        if promotion is not None:
            self._histories.append(_History(session_id, salt, tokens, promotion))

    def go_on(self) -> bool:
        """Where a part has come, ask for the next; whether anything is still to come."""
        over = [history for history in self._histories if history.promotion.is_over]
        self._histories = [history for history in self._histories if not history.promotion.is_over]
        for history in over:
            if history.promotion.failure is None:
                self.begin(history.session_id, history.salt, history.tokens)
            else:
                self._note_failure(history.session_id, history.promotion.failure)
            self._store.end_promotion(history.promotion)
        return bool(self._histories)

    def take_failure(self, session_id: str) -> Failure | None:
        """Why some of the session's history did not come, told once."""
        return self._failures.pop(session_id, None)

    def _note_failure(self, session_id: str, failure: Failure) -> None:
        self._failures[session_id] = failure
        if len(self._failures) > MAX_FAILURES:
            del self._failures[next(iter(self._failures))]
