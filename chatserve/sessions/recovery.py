"""What the log says of a response that was interrupted: how far it had come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from chatserve.errors import Unavailable
from chatserve.protocol.codec import from_wire
from chatserve.sessions.limits import SessionLimits
from chatserve.sessions.plan import TurnPlan
from chatserve.sessions.ports import Store
from chatserve.storage.session_store import LogEntry


@dataclass(slots=True)
class LoggedProgress:
    """The text that was sent, the ids it came from, and the `response.in_progress` event if there was one."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    in_progress: dict[str, Any] | None = None


async def read_progress(store: Store, session_id: str, plan: TurnPlan, limits: SessionLimits) -> LoggedProgress:
    """All that the log holds of the response. Raises Unavailable (`server_interrupted`) where its beginning is gone."""
    progress = LoggedProgress()
    deltas = []
    async for entry in _entries_from(store, session_id, plan.seq, limits.read_entries):
        event = from_wire(entry.wire)
        if event.get("response_id") != plan.response_id:
            continue
        if event["type"] == "response.in_progress":
            progress.in_progress = event
        elif event["type"] == "response.output_text.delta":
            deltas.append(event["delta"])
            progress.token_ids += entry.token_ids
    progress.text = "".join(deltas)
    return progress


async def _entries_from(store: Store, session_id: str, seq: int, limit: int) -> AsyncIterator[LogEntry]:
    expected = seq
    while entries := await store.read_log(session_id, expected - 1, limit):
        for entry in entries:
            if entry.seq != expected:
                raise cannot_continue("its log is incomplete")
            yield entry
            expected += 1
    if expected == seq:
        raise cannot_continue("its log is gone")


def cannot_continue(reason: str) -> Unavailable:
    """Why an interrupted response ends where it is."""
    return Unavailable(
        f"this response was interrupted and cannot go on: {reason}; ask for it again", code="server_interrupted"
    )
