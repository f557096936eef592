"""Every event of protocol `chatserve.v1` as a builder of a plain dict, ready for `codec`.

A field that is None is left out, except inside `cache`, where null says "no tier" and "no reason". Session events
become log entries by `stamp`; connection events go out as they are. No I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from typing_extensions import TypedDict  # the one that pydantic reads before Python 3.12

Event = dict[str, Any]
Mode = Literal["replay", "snapshot"]
Role = Literal["user", "assistant", "system"]
CacheResult = Literal["hit", "partial", "miss"]
Tier = Literal["device", "host", "disk"]
IncompleteReason = Literal["max_output_tokens", "context_window"]
MissReason = Literal[
    "first_turn",
    "input_changed",
    "template_changed",
    "evicted",
    "not_saved",
    "expired",
    "checksum_failed",
    "read_failed",
    "model_changed",
]
TERMINAL_EVENTS = frozenset({"response.completed", "response.incomplete", "response.cancelled", "response.failed"})


class InputTokensDetails(TypedDict):
    """How many input tokens needed no work."""

    cached_tokens: int


class CachedTokensDetails(TypedDict):
    """Where the cached tokens came from."""

    device: int
    host: int
    disk: int


class Usage(TypedDict):
    """Tokens of one response; cached tokens are never more than the input's."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    total_tokens: int
    cached_tokens_details: CachedTokensDetails


class Timings(TypedDict):
    """Milliseconds of one response, and its rate after the first token."""

    queue_ms: float
    restore_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms: float
    tokens_per_second: float


class Cache(TypedDict):
    """What was reused: `restored_from` is the slowest tier that contributed, None where nothing was.

    `reason` says why that was not all: `evicted` to make room in memory, `expired` from a full disk where it was the
    longest unused, `not_saved` where no tier had it when the server started. None where nothing was lacking, or what
    lies below was computed again because that is sooner than reading it.
    """

    result: CacheResult
    restored_from: Tier | None
    reason: MissReason | None


class TextContent(TypedDict):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class ErrorObject(TypedDict, total=False):
    """The `error` object: what `ServiceError.as_object` gives."""

    type: str
    code: str
    message: str
    param: str
    retryable: bool
    retry_after_ms: int


def message_object(*, message_id: str, parent_id: str | None, role: Role, text: str, created_at: int) -> Event:
    """The `message` object; `created_at` in milliseconds. The first message of a session has no parent."""
    content: list[TextContent] = [{"type": "text", "text": text}]
    return _without_none(
        {"id": message_id, "parent_id": parent_id, "role": role, "content": content, "created_at": created_at}
    )


def response_object(
    *,
    response_id: str,
    message_id: str,
    parent_id: str | None,
    model: str,
    status: str,
    text: str | None = None,
    usage: Usage | None = None,
    timings: Timings | None = None,
    cache: Cache | None = None,
    resumed: bool = False,
    incomplete_reason: IncompleteReason | None = None,
    error: Mapping[str, Any] | None = None,
) -> Event:
    """The `response` object, as far as it is known. `resumed`: it was interrupted and went on."""
    return _without_none(
        {
            "id": response_id,
            "message_id": message_id,
            "parent_id": parent_id,
            "model": model,
            "status": status,
            "text": text,
            "usage": usage,
            "timings": timings,
            "cache": cache,
            "resumed": resumed or None,
            "incomplete_details": {"reason": incomplete_reason} if incomplete_reason else None,
            "error": error,
        }
    )


def usage_object(*, input_tokens: int, output_tokens: int, cached_tokens: Mapping[str, int]) -> Usage:
    """The `usage` object; `cached_tokens` by tier. Their sum is bounded by `input_tokens`."""
    by_tier: CachedTokensDetails = {
        "device": cached_tokens.get("device", 0),
        "host": cached_tokens.get("host", 0),
        "disk": cached_tokens.get("disk", 0),
    }
    num_cached = by_tier["device"] + by_tier["host"] + by_tier["disk"]
    if num_cached > input_tokens:
        raise ValueError(f"{num_cached} cached tokens of {input_tokens} input tokens: count only those of the input")
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": {"cached_tokens": num_cached},
        "output_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
        "cached_tokens_details": by_tier,
    }


# Connection events: no seq.


def welcome(
    *,
    connection_id: str,
    server: Mapping[str, Any],
    limits: Mapping[str, Any],
    models: Sequence[Any],
    heartbeat_ms: int,
) -> Event:
    """The answer to `hello`."""
    return {
        "type": "welcome",
        "connection_id": connection_id,
        "server": dict(server),
        "limits": dict(limits),
        "models": list(models),
        "heartbeat_ms": heartbeat_ms,
    }


def ok(command_id: str, **fields: Any) -> Event:
    """A command was carried out; what it gives stands at the top level."""
    return _without_none({"type": "ok", "id": command_id, **fields})


def error(error_object: Mapping[str, Any], *, command_id: str | None = None, session_id: str | None = None) -> Event:
    """A command was refused, or something failed; `error_object` is `ServiceError.as_object()`."""
    return _without_none(
        {"type": "error", "id": command_id, "session_id": session_id, "error": _without_none(error_object)}
    )


def session_attached(
    *,
    session_id: str,
    epoch: int,
    head_seq: int,
    mode: Mode,
    snapshot: Mapping[str, Any] | None = None,
    command_id: str | None = None,
) -> Event:
    """This connection follows the session now; without `command_id` it answers an entry of `hello.resume`."""
    return _without_none(
        {
            "type": "session.attached",
            "id": command_id,
            "session_id": session_id,
            "epoch": epoch,
            "head_seq": head_seq,
            "mode": mode,
            "snapshot": snapshot,
        }
    )


def pong(*, t: float, server_ts: int) -> Event:
    """The answer to `ping`; `server_ts` in milliseconds."""
    return {"type": "pong", "t": t, "server_ts": server_ts}


def goaway(*, reason: str, time_left_ms: int, reconnect_after_ms: int) -> Event:
    """The server is about to close this connection; come back after the time given."""
    return {
        "type": "goaway",
        "reason": reason,
        "time_left_ms": time_left_ms,
        "reconnect_after_ms": reconnect_after_ms,
    }


def sessions_changed() -> Event:
    """The tenant's list of sessions is not what it was: fetch it again where it is shown."""
    return {"type": "sessions.changed"}


# Session events: they become log entries by `stamp`.


def session_created(session: Mapping[str, Any]) -> Event:
    """The first event of every session."""
    return {"type": "session.created", "session": dict(session)}


def session_updated(session: Mapping[str, Any]) -> Event:
    """Title, metadata, params, head, archived or pinned changed."""
    return {"type": "session.updated", "session": dict(session)}


def session_deleted() -> Event:
    """The session is gone; nothing follows."""
    return {"type": "session.deleted"}


def message_created(message: Mapping[str, Any]) -> Event:
    """A message joined the tree; see `message_object`."""
    return {"type": "message.created", "message": dict(message)}


def response_created(response: Mapping[str, Any]) -> Event:
    """A response was accepted; see `response_object`."""
    return {"type": "response.created", "response": dict(response)}


def response_in_progress(*, response_id: str, usage: Usage, queue_ms: float, cache: Cache) -> Event:
    """Prefill is done: what was reused is known before the first token."""
    return {
        "type": "response.in_progress",
        "response_id": response_id,
        "usage": usage,
        "queue_ms": queue_ms,
        "cache": cache,
    }


def output_text_delta(*, response_id: str, offset: int, delta: str) -> Event:
    """More text of the reply; `offset` counts the code points before it."""
    return {"type": "response.output_text.delta", "response_id": response_id, "offset": offset, "delta": delta}


def output_text_done(*, response_id: str, text: str) -> Event:
    """The whole text of the reply, to check the deltas against."""
    return {"type": "response.output_text.done", "response_id": response_id, "text": text}


def response_resumed(*, response_id: str, offset: int) -> Event:
    """A response goes on after an interruption, from the code point given."""
    return {"type": "response.resumed", "response_id": response_id, "offset": offset}


def response_completed(response: Mapping[str, Any]) -> Event:
    """Terminal: the reply ended by itself or at a stop string."""
    return {"type": "response.completed", "response": dict(response)}


def response_incomplete(response: Mapping[str, Any]) -> Event:
    """Terminal: the reply ran into a limit, named in `incomplete_details`."""
    return {"type": "response.incomplete", "response": dict(response)}


def response_cancelled(response: Mapping[str, Any]) -> Event:
    """Terminal: cancelled; what was said so far is kept."""
    return {"type": "response.cancelled", "response": dict(response)}


def response_failed(response: Mapping[str, Any]) -> Event:
    """Terminal: it failed for the reason in `error`."""
    return {"type": "response.failed", "response": dict(response)}


def stamp(event: Mapping[str, Any], session_id: str, seq: int, ts: int) -> Event:
    """The session event with its place in the log: `seq` counts from 1 in each session, `ts` in milliseconds."""
    return {**event, "session_id": session_id, "seq": seq, "ts": ts}


def _without_none(fields: Mapping[str, Any]) -> Event:
    return {name: value for name, value in fields.items() if value is not None}
