"""What sessions need of storage, seen from here: the store and the records, as protocols."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, Unpack

from chatserve.storage.records import RecordChanges
from chatserve.storage.session_store import IdempotencyKey, LogEntry, MessageRecord, SessionMeta, StoredKey


class Store(Protocol):
    """`chatserve.storage.session_store.SessionStore`, and the double that fails on demand."""

    async def wait_available(self) -> None: ...

    async def create(
        self,
        meta: SessionMeta,
        entries: Sequence[LogEntry],
        key: IdempotencyKey | None = None,
        *,
        messages: Iterable[MessageRecord] = (),
    ) -> StoredKey | None: ...

    async def append(
        self,
        session_id: str,
        entries: Sequence[LogEntry],
        *,
        expected_head: int,
        messages: Iterable[MessageRecord] = (),
        meta: Mapping[str, Any] = ...,
        key: IdempotencyKey | None = None,
    ) -> StoredKey | None: ...

    async def take_fence(self, session_id: str, acknowledged_head: int | None = None) -> SessionMeta: ...

    async def find_key(self, scope: str, key: str) -> StoredKey | None: ...

    async def load_meta(self, session_id: str) -> SessionMeta | None: ...

    async def load_messages(self, session_id: str) -> dict[str, MessageRecord]: ...

    async def read_log(self, session_id: str, after_seq: int, limit: int) -> list[LogEntry]: ...

    async def first_seq(self, session_id: str) -> int | None: ...

    async def trim_log(self, session_id: str, min_seq: int) -> None: ...

    async def list_sessions(
        self, tenant: str, limit: int = 50, before: str | None = None, words: Sequence[str] = ()
    ) -> list[SessionMeta]: ...

    async def active_sessions(self) -> list[str]: ...

    async def delete(self, session_id: str, tenant: str) -> bool: ...


class Records(Protocol):
    """What eviction reads about a session; written without waiting."""

    def touch(self, session_id: str, **changes: Unpack[RecordChanges]) -> None: ...
