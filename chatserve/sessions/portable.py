"""Sessions as documents that leave this server and come back: exported whole, imported under names of their own.

A document is whatever somebody sends: every field is typed and bounded, ids in it name messages within it only, and
its token ids count where they are this model's and say the text beside them; else the text alone does.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from chatserve.engine.api import EngineInfo
from chatserve.errors import BadRequest
from chatserve.protocol import events
from chatserve.protocol.commands import Counter, Id, LongText, Metadata, Params, Title, TokenId, given_params
from chatserve.sessions.ids import new_epoch, new_id
from chatserve.sessions.session import LiveSession
from chatserve.storage.session_store import MessageRecord, SessionMeta

FORMAT = "chatserve.session"
VERSION = 1
MAX_MESSAGES = 20_000
_NOT_SAID = re.compile(r"[\s\ufffd]+")  # what decoding may add or lose at a message's ends


def _iso_date(text: str) -> str:
    return datetime.date.fromisoformat(text).isoformat()


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class PortableModel(_Part):
    """The model whose token ids stand in the document."""

    id: Annotated[str, Field(min_length=1, max_length=512)]
    vocab_size: Annotated[int, Field(ge=1, lt=1 << 31)]


class PortableSession(_Part):
    """What a session is, apart from its messages. `template_date` is the day that its chat template reads."""

    title: Title = ""
    instructions: LongText = ""
    metadata: Metadata = Field(default_factory=dict)
    params: Params = Field(default_factory=Params)
    template_date: Annotated[str, AfterValidator(_iso_date)] | None = None
    head_id: Id | None = None
    created_at: Counter = 0


class PortableMessage(_Part):
    """One message; see `MessageRecord`. `model` made a reply."""

    id: Id
    parent_id: Id | None = None
    role: Literal["user", "assistant"]
    text: LongText
    token_ids: list[TokenId] = Field(default_factory=list)
    pending_text: LongText = ""
    state: Literal["complete", "incomplete", "cancelled", "failed"] = "complete"
    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    created_at: Counter = 0


class Document(_Part):
    """A whole session. Messages stand in order: each behind the one it hangs on."""

    format: Literal["chatserve.session"]
    version: Literal[1]
    model: PortableModel
    session: PortableSession
    messages: Annotated[list[PortableMessage], Field(max_length=MAX_MESSAGES)]
    exported_at: Counter = 0


@dataclass(frozen=True, slots=True)
class SessionImport:
    """The command to import a document. `key` makes a repeated one harmless; the hash tells documents apart."""

    key: str
    document_hash: str


def export_document(live: LiveSession, info: EngineInfo) -> dict[str, Any]:
    """The session as plain values, ready for JSON. A reply in progress is left out: it has not been said yet."""
    meta = live.meta
    messages = [message for message in live.messages.values() if message.state != "in_progress"]
    head = live.messages.get(meta.head_id or "")
    head_id = head.parent_id if head and head.state == "in_progress" else meta.head_id
    return {
        "format": FORMAT,
        "version": VERSION,
        "exported_at": live.now_ms(),
        "model": {"id": info.model, "vocab_size": info.vocab_size},
        "session": {
            "title": meta.title,
            "instructions": meta.instructions,
            "metadata": dict(meta.metadata),
            "params": dict(meta.params),
            "template_date": meta.template_date or None,
            "head_id": head_id,
            "created_at": meta.created_at,
        },
        "messages": [_exported(message) for message in messages],
    }


def _exported(message: MessageRecord) -> dict[str, Any]:
    exported = {
        "id": message.id,
        "parent_id": message.parent_id,
        "role": message.role,
        "text": message.text,
        "token_ids": list(message.token_ids),
        "pending_text": message.pending_text,
        "state": message.state,
        "created_at": message.created_at,
    }
    return exported if message.response is None else {**exported, "model": message.response.get("model")}


def read_document(raw: bytes) -> Document:
    """The document in an import's body. Raises BadRequest that names the place at fault and what stands there."""
    try:
        document = Document.model_validate_json(raw)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(step) for step in fault["loc"])
        raise BadRequest(
            f"this is not an exported session: {place or 'body'}: {fault['msg'][:200]}; send what export gives as JSON",
            param=place or None,
        ) from None
    _check_tree(document)
    return document


def import_command(raw: bytes, key: str) -> SessionImport:
    """The command to import the document in this body."""
    return SessionImport(key, hashlib.sha256(raw).hexdigest())


def _check_tree(document: Document) -> None:
    known: dict[str, PortableMessage] = {}
    for index, message in enumerate(document.messages):
        fault = _fault_of_place(message, known)
        if fault:
            raise BadRequest(f"messages.{index}: {fault}", param=f"messages.{index}")
        known[message.id] = message
    if document.session.head_id is not None and document.session.head_id not in known:
        raise BadRequest(f"there is no message {document.session.head_id!r} to be the head", param="session.head_id")


def _fault_of_place(message: PortableMessage, known: Mapping[str, PortableMessage]) -> str | None:
    """What is wrong with where a message hangs."""
    parent = known.get(message.parent_id or "")
    if message.id in known:
        return f"there is a message {message.id!r} before it; give each its own id"
    if message.parent_id is not None and parent is None:
        return f"its parent {message.parent_id!r} does not stand before it"
    if message.role == "assistant" and parent is None:
        return "a reply needs a parent_id: the message that it answers"
    if message.role == "user" and parent is not None and parent.role == "user":
        return f"it is a user message, and so is its parent {parent.id!r}; a reply belongs between them"
    return None


def imported_session(
    tenant: str, document: Document, info: EngineInfo, decode: Callable[[Iterable[int]], str], now_ms: int
) -> tuple[SessionMeta, list[MessageRecord]]:
    """The session that a document describes, new in all but its words. It takes time: call it in a thread."""
    keeps_ids = _ids_count(document, info, decode)
    new_ids = {message.id: new_id("msg", now_ms) for message in document.messages}
    messages: list[MessageRecord] = []
    for message in document.messages:
        last_ms = messages[-1].created_at if messages else -1  # stored messages are ordered by their times
        created_at = max(min(message.created_at, now_ms), last_ms + 1)
        messages.append(_imported(message, new_ids, document.model.id, keeps_ids, created_at))
    return _imported_meta(tenant, document, new_ids, now_ms), messages


def _imported_meta(tenant: str, document: Document, new_ids: Mapping[str, str], now_ms: int) -> SessionMeta:
    session = document.session
    last_id = document.messages[-1].id if document.messages else None
    head_id = session.head_id or last_id
    return SessionMeta(
        id=new_id("sess", now_ms),
        tenant=tenant,
        title=session.title,
        instructions=session.instructions,
        metadata=dict(session.metadata),
        params=given_params(session.params),
        created_at=min(session.created_at, now_ms) or now_ms,
        updated_at=now_ms,
        epoch=new_epoch(),
        head_seq=1,
        head_id=new_ids[head_id] if head_id else None,
        template_date=session.template_date or datetime.date.fromtimestamp(now_ms / 1000).isoformat(),
        num_messages=len(document.messages),
    )


def _imported(
    message: PortableMessage, new_ids: Mapping[str, str], model: str, keeps_ids: bool, created_at: int
) -> MessageRecord:
    is_reply = message.role == "assistant"
    keeps_ids = keeps_ids and bool(message.token_ids)
    record = MessageRecord(
        id=new_ids[message.id],
        parent_id=new_ids[message.parent_id] if message.parent_id else None,
        role=message.role,
        text=message.text,
        token_ids=list(message.token_ids) if keeps_ids else [],
        state=message.state,
        created_at=created_at,
        # Text that no token covers is encoded with the next turn; without ids that is all of a reply.
        pending_text=message.pending_text if keeps_ids else message.text * is_reply,
    )
    if is_reply and record.parent_id:
        record.response = events.response_object(
            response_id=new_id("resp", created_at),
            message_id=record.id,
            parent_id=record.parent_id,
            model=message.model or model,
            status="completed" if message.state == "complete" else message.state,
            text=message.text,
        )
    return record


def _ids_count(document: Document, info: EngineInfo, decode: Callable[[Iterable[int]], str]) -> bool:
    """Whether the document's token ids are this model's and say what its texts say."""
    if (document.model.id, document.model.vocab_size) != (info.model, info.vocab_size):
        return False
    own = [message for message in document.messages if message.model in (None, info.model)]
    if any(max(message.token_ids, default=0) >= info.vocab_size for message in own):
        return False
    return all(_says_its_text(message, decode) for message in own)


def _says_its_text(message: PortableMessage, decode: Callable[[Iterable[int]], str]) -> bool:
    """Whether ids and text agree; a user's ids hold the chat template around the text as well. No ids say nothing."""
    if not message.token_ids:
        return True
    said, text = _essence(decode(message.token_ids) + message.pending_text), _essence(message.text)
    return text == said if message.role == "assistant" else text in said


def _essence(text: str) -> str:
    return _NOT_SAID.sub("", unicodedata.normalize("NFKC", text))
