"""Small builders for the storage tests."""

from __future__ import annotations

from chatserve.protocol import events
from chatserve.protocol.codec import to_wire
from chatserve.storage.session_store import LogEntry, MessageRecord, SessionMeta


def log_entry(session_id: str, seq: int, text: str = "hello", token_ids: tuple[int, ...] = ()) -> LogEntry:
    """A delta event of the session."""
    delta = events.output_text_delta(response_id="r1", offset=seq, delta=text)
    return LogEntry(seq, to_wire(events.stamp(delta, session_id, seq, 1732170000000 + seq)), token_ids)


def log_entries(session_id: str, first_seq: int, count: int) -> list[LogEntry]:
    """Several delta events of the session."""
    return [log_entry(session_id, seq) for seq in range(first_seq, first_seq + count)]


def session_meta(session_id: str, tenant: str = "acme", updated_at: int = 1) -> SessionMeta:
    """A session with nothing but its names and times."""
    return SessionMeta(id=session_id, tenant=tenant, created_at=updated_at, updated_at=updated_at)


def message_record(message_id: str, parent_id: str | None = None, created_at: int = 1) -> MessageRecord:
    """A user's message."""
    return MessageRecord(message_id, parent_id, "user", f"text of {message_id}", [1, 2], "complete", created_at)
