"""A resident session and the lease a request holds on it.

The lease is what the engine's step touches at every token: it does nothing but count until a page completes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvstore.arrays import GrowingArray, TokenArray
from kvstore.layout import KVLayout
from kvstore.node import Resident
from kvstore.tensor import VirtualTensor


@dataclass(eq=False, slots=True)
class Session:
    """A session that owns a range: its mapped rows, its place in the index, and its lease if there is one.

    While no lease is held every mapped page is the index's, which knows their tokens.
    """

    session_id: str
    range_number: int
    tensor: VirtualTensor
    resident: Resident
    salt: bytes = b""
    lease: Lease | None = None


class LeaseKeeper(Protocol):
    """What a lease needs of its store."""

    def grow(self, session: Session, num_tokens: int) -> None:
        """Map writable rows up to `num_tokens`."""
        ...

    def guard(self, session: Session, num_tokens: int) -> None:
        """Make the rest of the kernel tile in which `num_tokens` end readable."""
        ...

    def publish(self, session: Session) -> int:
        """Put complete pages in the index; returns at how many tokens to call again."""
        ...

    def release(self, session: Session) -> None:
        """End the session's lease."""
        ...


class Lease:
    """A request's hold on its session's rows: they stay mapped, and the rows behind `kv_length` are its to write.

    `base_token` is the arena row of the session's first token, `num_cached_tokens` what `kv_length` was at the start,
    `tokens` the ids of the rows so far. After `release` no method but that one may be called, and no property read.
    """

    __slots__ = (
        "_keeper",
        "_publish_at",
        "_released",
        "_session",
        "_tensor",
        "base_token",
        "num_cached_tokens",
        "tokens",
    )

    def __init__(self, keeper: LeaseKeeper, session: Session, tokens: TokenArray, layout: KVLayout) -> None:
        self.base_token = session.tensor.offset // layout.token_bytes
        self.num_cached_tokens = len(tokens)
        self.tokens: GrowingArray[np.int32] = GrowingArray(tokens, np.int32)
        self._keeper = keeper
        self._session = session
        self._tensor = session.tensor
        self._publish_at = layout.tokens_to_fill(layout.complete_pages(len(tokens)) + 1)
        self._released = False

    @property
    def session_id(self) -> str:
        """Whose rows these are."""
        return self._session.session_id

    @property
    def kv_length(self) -> int:
        """Tokens whose rows are written."""
        return self._tensor.num_tokens

    @property
    def capacity_tokens(self) -> int:
        """Tokens whose rows may be written: those mapped so far."""
        return self._tensor.capacity_tokens

    def grow(self, num_tokens: int) -> None:
        """Make `capacity_tokens` at least `num_tokens`; zeroed pages are mapped, idle ones evicted for them.

        Raises OutOfPages with nothing changed, ValueError beyond the store's `max_session_tokens`.
        """
        self._ensure_held()
        if num_tokens > self._tensor.capacity_tokens:
            self._keeper.grow(self._session, num_tokens)

    def guard(self, num_tokens: int) -> None:
        """A kernel is about to read whole tiles of rows [0, num_tokens): map zeros behind the last page where needed.

        They go with `unguard`, and with anything that maps or unmaps rows. Does nothing in a store without
        `tile_tokens`. Raises OutOfPages (OutOfMappings) with nothing changed.
        """
        self._ensure_held()
        self._keeper.guard(self._session, num_tokens)

    def unguard(self) -> None:
        """The kernels that read whole tiles are launched: take guards away before growth has to wait for that."""
        self._ensure_held()
        self._tensor.unguard()

    def commit(self, token_ids: Sequence[int]) -> None:
        """The rows of these tokens, the next ones after `kv_length`, are written and will not change.

        Raises ValueError beyond `capacity_tokens`.
        """
        self._ensure_held()
        tensor = self._tensor
        num_tokens = tensor.num_tokens + len(token_ids)
        if num_tokens > tensor.capacity_tokens:
            raise ValueError(f"commit up to {num_tokens} tokens: only {tensor.capacity_tokens} are mapped; grow first")
        self.tokens.extend(token_ids)
        tensor.num_tokens = num_tokens
        if num_tokens >= self._publish_at:
            self._publish_at = self._keeper.publish(self._session)

    def release(self) -> None:
        """Let go: the rows stay mapped and usable, but may be evicted. Does nothing the second time."""
        if not self._released:
            self._released = True
            self._keeper.release(self._session)

    def _ensure_held(self) -> None:
        if self._released:
            raise ValueError(f"the lease on session {self.session_id!r} was released")
