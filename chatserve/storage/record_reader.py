"""Session records in Redis, read for evictions: the planner's side, on a thread of its own in the engine's process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from redis import Redis
from redis.exceptions import RedisError

from chatserve.storage.scripts import RECORD_CHANGES, session_key
from kvstore.records import SessionRecord, SessionRecords


class RedisRecordReader(SessionRecords):
    """Reads records for the planner of evictions: blocking, for a thread that nobody waits for."""

    def __init__(self, redis_url: str, *, timeout_s: float = 5.0) -> None:
        self._redis = Redis.from_url(redis_url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, protocol=2)

    def changed_since(self, time_s: float) -> list[SessionRecord]:
        """The records written at or after `time_s` (seconds since 1970), oldest change first. Raises OSError."""
        try:
            changed = cast("list[bytes]", self._redis.zrangebyscore(RECORD_CHANGES, int(time_s * 1000), "+inf"))
            ids = [member.decode() for member in changed]
            pipeline = self._redis.pipeline(transaction=False)
            for session_id in ids:
                pipeline.hgetall(session_key(session_id, "record"))
            rows = pipeline.execute()
        except (RedisError, OSError) as error:
            raise OSError(f"Redis does not answer: {error}") from error
        return [_record(session_id, row) for session_id, row in zip(ids, rows, strict=True) if row]

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()


def _record(session_id: str, row: Mapping[bytes, bytes]) -> SessionRecord:
    """A record with what is not known yet at its resting value."""
    values: dict[str, Any] = {name: read(row.get(name.encode(), b"0")) for name, read in _READ.items()}
    return SessionRecord(session_id=session_id, owner=row.get(b"owner", b"").decode(), **values)


def _flag(value: bytes) -> bool:
    return value == b"1"


_READ: Mapping[str, Callable[[bytes], Any]] = {
    "last_activity_s": float,
    "turns": int,
    "tokens": int,
    "think_time_s": float,
    "connected": _flag,
    "typing": _flag,
    "priority": int,
    "pinned": _flag,
}
