"""What the session store keeps, as dataclasses, and how each is written in Redis. No I/O.

Token ids are packed as little-endian int32; maps as msgpack; a None is an absent hash field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

import msgpack
import numpy as np

MessageState = Literal["complete", "in_progress", "incomplete", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One event of a session: its msgpack bytes, and the token ids that it added to the history, if any."""

    seq: int
    wire: bytes
    token_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class MessageRecord:
    """One message of the tree. `token_ids` is what it added to its path: a history is the concatenation over ancestors.

    `pending_text` holds the characters kept that no token covers; `response` is an assistant message's response object.
    `created_at` in milliseconds. `request` is what the surface that asked for a reply wants to find with it again.
    """

    id: str
    parent_id: str | None
    role: str
    text: str
    token_ids: list[int]
    state: MessageState
    created_at: int
    pending_text: str = ""
    response: dict[str, Any] | None = None
    request: dict[str, Any] | None = None


@dataclass(slots=True)
class SessionMeta:
    """What a session is, without its messages. `created_at` and `updated_at` in milliseconds.

    `active` is the running response with all that a restart needs to continue it. `fence` is the instance that may
    append; the store sets it, as it sets `head_seq` and `epoch`.
    """

    id: str
    tenant: str
    title: str = ""
    instructions: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    archived: bool = False
    pinned: bool = False
    created_at: int = 0
    updated_at: int = 0
    epoch: int = 1
    head_seq: int = 0
    head_id: str | None = None
    fence: str = ""
    template_date: str = ""
    num_messages: int = 0
    active: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """A client-made key with the hash of the body it came with, and what to answer when it comes again.

    `scope` is the session id for commands on a session (they go with it when it is deleted) and the tenant for the
    creation of sessions. `result` should hold ids only: a tenant's keys outlive a deleted session, for 24 hours.
    """

    scope: str
    key: str
    body_hash: str
    result: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key that was used before: the hash of its body, and the answer it got."""

    body_hash: str
    result: dict[str, Any]


_META_FIELDS = tuple(entry.name for entry in fields(SessionMeta))
_MESSAGE_FIELDS = tuple(entry.name for entry in fields(MessageRecord))
_OWN_FIELDS = frozenset({"id", "tenant", "created_at", "epoch", "head_seq", "fence"})  # never changed by an append


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian int32; raises `OverflowError` for one that does not fit."""
    return np.asarray(token_ids, dtype="<i4").tobytes() if token_ids else b""


def unpack_token_ids(packed: bytes) -> list[int]:
    """The token ids packed by `pack_token_ids`."""
    return cast("list[int]", np.frombuffer(packed, dtype="<i4").tolist())


def pack_message(message: MessageRecord) -> bytes:
    """A message as it is stored."""
    row = {name: getattr(message, name) for name in _MESSAGE_FIELDS}
    row["token_ids"] = pack_token_ids(message.token_ids)
    return cast(bytes, msgpack.packb(row))


def unpack_message(packed: bytes) -> MessageRecord:
    """The message packed by `pack_message`."""
    row = msgpack.unpackb(packed)
    row["token_ids"] = unpack_token_ids(row["token_ids"])
    return MessageRecord(**row)


def text_of_message(packed: bytes) -> str:
    """What the message packed by `pack_message` says."""
    return cast(str, msgpack.unpackb(packed)["text"])


def pack_key(key: IdempotencyKey) -> bytes:
    """What is remembered of a key."""
    return cast(bytes, msgpack.packb({"body_hash": key.body_hash, "result": key.result}))


def unpack_key(packed: bytes) -> StoredKey:
    """The key packed by `pack_key`."""
    return StoredKey(**msgpack.unpackb(packed))


def pack_meta(meta: SessionMeta) -> dict[str, bytes]:
    """The hash fields of a session, those that are None left out."""
    packed = {name: _PACK[name](getattr(meta, name)) for name in _META_FIELDS}
    return {name: value for name, value in packed.items() if value is not None}


def pack_changes(changes: Mapping[str, Any]) -> tuple[dict[str, bytes], list[str]]:
    """Changed fields of a session as the hash fields to set and those to remove.

    Raises `ValueError` for a field that there is not or that an append must not change.
    """
    for name in changes:
        if name not in _PACK or name in _OWN_FIELDS:
            allowed = ", ".join(sorted(set(_PACK) - _OWN_FIELDS))
            raise ValueError(f"an append cannot change {name!r} of a session; it can change {allowed}")
    packed = {name: _PACK[name](value) for name, value in changes.items()}
    kept = {name: value for name, value in packed.items() if value is not None}
    return kept, [name for name, value in packed.items() if value is None]


def unpack_meta(row: Mapping[bytes, bytes]) -> SessionMeta:
    """The session packed by `pack_meta`; hash fields that are not part of it are left out."""
    found = {name: row[name.encode()] for name in _META_FIELDS if name.encode() in row}
    return SessionMeta(**{name: _UNPACK[name](value) for name, value in found.items()})


def _pack_text(value: str | None) -> bytes | None:
    return None if value is None else value.encode()


def _unpack_text(value: bytes) -> str:
    return value.decode()


def _pack_int(value: int) -> bytes:
    return b"%d" % value


def _pack_map(value: Mapping[str, Any] | None) -> bytes | None:
    return None if value is None else cast(bytes, msgpack.packb(value))


def _unpack_flag(value: bytes) -> bool:
    return value == b"1"


_INTS = ("created_at", "updated_at", "epoch", "head_seq", "num_messages")
_FLAGS = ("archived", "pinned")
_MAPS = ("metadata", "params", "active")
_TEXTS = tuple(name for name in _META_FIELDS if name not in (*_INTS, *_FLAGS, *_MAPS))
_PACK: dict[str, Callable[[Any], bytes | None]] = (
    dict.fromkeys(_TEXTS, _pack_text) | dict.fromkeys((*_INTS, *_FLAGS), _pack_int) | dict.fromkeys(_MAPS, _pack_map)
)
_UNPACK: Mapping[str, Callable[[bytes], Any]] = (
    dict.fromkeys(_TEXTS, _unpack_text)
    | dict.fromkeys(_INTS, int)
    | dict.fromkeys(_FLAGS, _unpack_flag)
    | dict.fromkeys(_MAPS, msgpack.unpackb)
)
