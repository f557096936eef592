"""Sessions, messages and running responses as clients see them: plain dicts, ready for either encoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chatserve.protocol import events
from chatserve.sessions.session import LiveSession
from chatserve.sessions.tree import ROOT, path_to
from chatserve.storage.session_store import MessageRecord, SessionMeta

View = dict[str, Any]


def session_fields(meta: SessionMeta) -> View:
    """What `session.created` and `session.updated` say of a session; they stand in the log and know no head."""
    return {
        "id": meta.id,
        "title": meta.title,
        "instructions": meta.instructions,
        "metadata": dict(meta.metadata),
        "params": dict(meta.params),
        "archived": meta.archived,
        "pinned": meta.pinned,
        "created_at": meta.created_at,
        "updated_at": meta.updated_at,
        "head_id": meta.head_id,
        "num_messages": meta.num_messages,
    }


def session_view(meta: SessionMeta) -> View:
    """A session without its messages, with where its log stands."""
    active = meta.active["response_id"] if meta.active else None
    return {**session_fields(meta), "epoch": meta.epoch, "head_seq": meta.head_seq, "active_response_id": active}


def snapshot(live: LiveSession, max_context: int) -> View:
    """A session with all its messages, the reply in progress as far as it is logged, and how much context is left."""
    return {
        **session_view(live.meta),
        "messages": [message_view(message) for message in live.messages.values()],
        "active_response": active_response(live),
        "context": context_view(live, max_context),
    }


def message_view(message: MessageRecord) -> View:
    """One message with its state and, of a reply, its response object without the text again."""
    view: View = events.message_object(
        message_id=message.id,
        parent_id=message.parent_id,
        role="assistant" if message.role == "assistant" else "user",
        text=message.text,
        created_at=message.created_at,
    )
    view["state"] = message.state
    if message.response:
        view["response"] = {name: value for name, value in message.response.items() if name != "text"}
    return view


def active_response(live: LiveSession) -> View | None:
    """The running response with the text that is logged."""
    plan = live.meta.active
    if plan is None:
        return None
    return events.response_object(
        response_id=plan["response_id"],
        message_id=plan["message_id"],
        parent_id=plan["parent_id"],
        model=plan["model"],
        status="in_progress",
        text=live.messages[plan["message_id"]].text,
    )


def context_view(live: LiveSession, max_context: int) -> View:
    """How many tokens the present branch takes and how many are left for input and reply."""
    used = num_branch_tokens(live)
    return {"used_tokens": used, "max_tokens": max_context, "left_tokens": max(0, max_context - used)}


def num_branch_tokens(live: LiveSession) -> int:
    """The tokens from the beginning to the branch head; where ids are not stored, by what the last reply took."""
    path = branch(live)
    if has_ids(path):
        return sum(len(message.token_ids) for message in path)
    num_behind = 0
    for message in reversed(path):
        num_behind += len(message.token_ids)
        if usage := (message.response or {}).get("usage"):
            return int(usage["input_tokens"]) + num_behind
    return num_behind


def has_ids(path: Sequence[MessageRecord]) -> bool:
    """Whether the tokens of the path are those of its messages: else it is rendered anew at each turn."""
    return all(message.token_ids for message in path if message.role == "user")


def branch(live: LiveSession) -> list[MessageRecord]:
    """The messages from the beginning to the branch head."""
    return path_to(live.messages, live.messages.get(live.meta.head_id or ROOT))
