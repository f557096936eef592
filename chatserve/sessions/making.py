"""New sessions: empty ones, and forks that begin as another session does; and what an update makes of one."""

from __future__ import annotations

import copy
import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

from chatserve.errors import Conflict
from chatserve.protocol.commands import SessionCreate, SessionFork, SessionUpdate, given_params
from chatserve.sessions.ids import new_epoch, new_id
from chatserve.sessions.session import LiveSession
from chatserve.sessions.tree import find_message, path_to
from chatserve.storage.session_store import MessageRecord, SessionMeta


def new_session(tenant: str, command: SessionCreate, now_ms: int) -> SessionMeta:
    """An empty session as the command wants it; today is the date its template will always read."""
    return SessionMeta(
        id=new_id("sess", now_ms),
        tenant=tenant,
        title=command.title or "",
        instructions=command.instructions or "",
        metadata=dict(command.metadata or {}),
        params=given_params(command.params) if command.params else {},
        created_at=now_ms,
        updated_at=now_ms,
        epoch=new_epoch(),
        head_seq=1,
        template_date=datetime.date.fromtimestamp(now_ms / 1000).isoformat(),
    )


def forked_session(live: LiveSession, command: SessionFork, now_ms: int) -> tuple[SessionMeta, list[MessageRecord]]:
    """A session with the messages up to the one named: same tokens, date and settings, so that it shares the cache.

    Raises NotFound for no such message, Conflict for one that is not finished.
    """
    message = find_message(live.messages, command.at_message_id, "at_message_id")
    if message.state == "in_progress":
        raise Conflict("the reply is still being made: wait for its end, or fork at the message before it")
    copies = copies_of(path_to(live.messages, message), now_ms)
    meta = dataclasses.replace(
        live.meta,
        id=new_id("sess", now_ms),
        title=live.meta.title if command.title is None else command.title,
        metadata=dict(live.meta.metadata),
        params=dict(live.meta.params),
        archived=False,
        pinned=False,
        created_at=now_ms,
        updated_at=now_ms,
        epoch=new_epoch(),
        head_seq=1,
        head_id=copies[-1].id,
        num_messages=len(copies),
        active=None,
    )
    return meta, copies


def copies_of(path: Sequence[MessageRecord], now_ms: int) -> list[MessageRecord]:
    """The messages under names of their own, each hanging on the copy of its parent."""
    new_ids = {message.id: new_id("msg", now_ms) for message in path}
    return [
        dataclasses.replace(
            message,
            id=new_ids[message.id],
            parent_id=new_ids[message.parent_id] if message.parent_id else None,
            token_ids=list(message.token_ids),
            response=_renamed(message, new_ids),
        )
        for message in path
    ]


def _renamed(message: MessageRecord, new_ids: dict[str, str]) -> dict[str, object] | None:
    """The response object of a copied reply; it keeps the response's own id."""
    if message.response is None or message.parent_id is None:
        return None
    response = copy.deepcopy(message.response)
    return {**response, "message_id": new_ids[message.id], "parent_id": new_ids[message.parent_id]}


def given_changes(live: LiveSession, command: SessionUpdate) -> dict[str, Any]:
    """The fields of the session that the command gives. Raises NotFound for a `head_id` that there is not."""
    if command.head_id is not None:
        find_message(live.messages, command.head_id, "head_id")
    given = {
        "title": command.title,
        "metadata": command.metadata,
        "params": given_params(command.params) if command.params else None,
        "head_id": command.head_id,
        "archived": command.archived,
        "pinned": command.pinned,
    }
    return {name: value for name, value in given.items() if value is not None}
