"""What the log says of a response that was interrupted: how far it had come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from chatserve.errors import Unavailable
from chatserve.protocol.codec import from_wire
from chatserve.sessions.limits import SessionLimits
from chatserve.sessions.plan import TurnPlan
from chatserve.sessions.ports import Store
from chatserve.storage.session_store import LogEntry, MessageRecord, SessionMeta


class CannotContinue(Unavailable):
    """Why an interrupted response ends where it is."""

    default_code = "server_interrupted"

    def __init__(self, reason: str) -> None:
        super().__init__(f"this response was interrupted and cannot go on: {reason}; ask for it again")


@dataclass(slots=True)
class LoggedProgress:
    """The text that was sent, the ids it came from, and the `response.in_progress` event if there was one."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    in_progress: dict[str, Any] | None = None


async def load_messages(store: Store, meta: SessionMeta, limits: SessionLimits) -> dict[str, MessageRecord]:
    """The session's messages, the running response's with the text that is logged."""
    messages = await store.load_messages(meta.id)
    if meta.active is not None and messages:
        plan = TurnPlan.from_map(meta.active)
        with suppress(CannotContinue):  # its beginning is gone: it ends as soon as it is taken up
            messages[plan.message_id].text = (await read_progress(store, meta.id, plan, limits)).text
    return messages


async def read_progress(store: Store, session_id: str, plan: TurnPlan, limits: SessionLimits) -> LoggedProgress:
    """All that the log holds of the response. Raises CannotContinue where its beginning is gone."""
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
                raise CannotContinue("its log is incomplete")
            yield entry
            expected += 1
    if expected == seq:
        raise CannotContinue("its log is gone")
