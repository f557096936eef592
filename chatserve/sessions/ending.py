"""How a response ends: its last events and the message that is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from chatserve.errors import ServiceError
from chatserve.protocol import events
from chatserve.sessions.accounting import Account
from chatserve.sessions.plan import TurnPlan
from chatserve.storage.session_store import MessageRecord

Status = Literal["completed", "incomplete", "cancelled", "failed"]
_TERMINAL: dict[Status, Callable[[Mapping[str, Any]], events.Event]] = {
    "completed": events.response_completed,
    "incomplete": events.response_incomplete,
    "cancelled": events.response_cancelled,
    "failed": events.response_failed,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a response ended, and why if not by itself."""

    status: Status
    incomplete_reason: events.IncompleteReason | None = None
    error: ServiceError | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """What a response leaves: its text, the ids that stand for it, and the end of the text that no id covers."""

    text: str
    token_ids: list[int]
    pending_text: str = ""


def response_of(plan: TurnPlan, outcome: Outcome, said: Said, account: Account) -> events.Event:
    """The response object of the terminal event."""
    num_output = len(said.token_ids)
    return events.response_object(
        response_id=plan.response_id,
        message_id=plan.message_id,
        parent_id=plan.parent_id,
        model=plan.model,
        status=outcome.status,
        text=said.text,
        usage=account.usage(num_output),
        timings=account.timings(num_output),
        cache=account.cache,
        resumed=account.resumed,
        incomplete_reason=outcome.incomplete_reason,
        error=outcome.error.as_object() if outcome.error else None,
    )


def last_events(response: Mapping[str, Any], outcome: Outcome) -> list[events.Event]:
    """The whole text once more, then the one terminal event."""
    done = events.output_text_done(response_id=response["id"], text=response["text"])
    return [done, _TERMINAL[outcome.status](response)]


def message_of(plan: TurnPlan, outcome: Outcome, said: Said, response: Mapping[str, Any]) -> MessageRecord:
    """The reply as the tree keeps it."""
    return MessageRecord(
        id=plan.message_id,
        parent_id=plan.parent_id,
        role="assistant",
        text=said.text,
        token_ids=said.token_ids,
        state="complete" if outcome.status == "completed" else outcome.status,
        created_at=plan.created_at,
        pending_text=said.pending_text,
        response=dict(response),
    )


def failure(error: ServiceError | None = None) -> Outcome:
    """Failed: for this reason, or through a fault of ours that the log explains."""
    fault = ServiceError("the server failed to make this response; its log says why")
    return Outcome("failed", error=error or fault)
