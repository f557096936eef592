"""Sessions that begin with messages: those of a path in another session, and others that were said elsewhere.

Unlike a fork, such a session may have instructions of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from chatserve.protocol.commands import SessionCreate
from chatserve.sessions.ids import new_id
from chatserve.sessions.making import copies_of, new_session
from chatserve.sessions.session import LiveSession
from chatserve.sessions.tree import find_message, path_to, prompt_path
from chatserve.storage.session_store import MessageRecord, SessionMeta
from chatserve.text.pipeline import PathMessage, TextPipeline


@dataclass(frozen=True, slots=True)
class Opening:
    """What a new session begins with: the path to a message of another session, if any, then `said`.

    `said` are a user's and an assistant's messages in turns.
    """

    session_id: str | None = None
    message_id: str | None = None
    said: Sequence[PathMessage] = ()


async def opened_session(
    tenant: str,
    command: SessionCreate,
    opening: Opening,
    base: LiveSession | None,
    text: TextPipeline,
    model: str,
    now_ms: int,
) -> tuple[SessionMeta, list[MessageRecord]]:
    """The session and its messages with their token ids; `base` is the session that `opening` names.

    Raises NotFound where that has no such message.
    """
    meta = new_session(tenant, command, now_ms)
    copies: list[MessageRecord] = []
    if base is not None and opening.message_id is not None:
        meta = dataclasses.replace(meta, template_date=base.meta.template_date)
        copies = copies_of(
            path_to(base.messages, find_message(base.messages, opening.message_id, "message_id")), now_ms
        )
        if meta.instructions != base.meta.instructions:
            await _instruct_anew(copies, meta, text)
    path = prompt_path({message.id: message for message in copies}, copies, model)
    longer = await text.extended(path, opening.said, instructions=meta.instructions, date=meta.template_date)
    messages = [*copies, *_records(longer[len(path) :], copies[-1] if copies else None, now_ms)]
    head_id = messages[-1].id if messages else None
    return dataclasses.replace(meta, head_id=head_id, num_messages=len(messages)), messages


async def _instruct_anew(copies: list[MessageRecord], meta: SessionMeta, text: TextPipeline) -> None:
    """Give the first message other ids: instructions stand in them."""
    first = PathMessage("user", copies[0].text, ())
    path = await text.extended((), [first], instructions=meta.instructions, date=meta.template_date)
    copies[0].token_ids = list(path[0].token_ids)


def _records(said: Sequence[PathMessage], parent: MessageRecord | None, now_ms: int) -> list[MessageRecord]:
    """The messages as the tree keeps them, each behind the one before it, also by its time."""
    records: list[MessageRecord] = []
    for message in said:
        created_at = max(now_ms, parent.created_at + 1 if parent else 0)
        parent = MessageRecord(
            id=new_id("msg", created_at),
            parent_id=parent.id if parent else None,
            role=message.role,
            text=message.text,
            token_ids=list(message.token_ids),
            state="complete",
            created_at=created_at,
            pending_text=message.pending_text,
        )
        records.append(parent)
    return records
