"""The reference of all messages as Markdown, from the dataclasses of the commands and the typed dicts of the events.

`bench/protocol_reference.py` writes it to `docs/protocol.md`. No I/O.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any, get_args

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from chatserve.protocol import shapes
from chatserve.protocol.commands import MAX_SAFE_INTEGER, Command

INTRODUCTION = """\
# Protocol `chatserve.v1`

Every message, generated from the code by `bench/protocol_reference.py`; [design.md](design.md) says why.

**Connection.** `GET /v1/ws` with the subprotocol `chatserve.v1.msgpack` (binary messages) or `chatserve.v1.json`
(text). The key comes as `Authorization: Bearer` or in `hello.token`. The first command is `hello`, within 10 s.

**Messages.** Each is a map with a `type`. A command carries an `id` and is answered by one `ok` or `error` with that
`id` (`session.attach` by `session.attached`; `hello` by `welcome`, `ping` by `pong`, `session.typing` by nothing).
Unknown commands and fields are errors; clients ignore events and fields that they do not know. In commands a null field
is an absent one.

**Following.** Each session has one log: `seq` counts from 1 within an `epoch`. Apply an event if its `seq_from` (its
`seq`, where it has none) is the last applied `seq` plus one; drop it if its `seq` is not beyond the last; else attach
again from the last. Another epoch, or a cursor whose events are gone, is answered by a snapshot, never by part of the
log.

**Repeating.** A command that was not answered is sent again with the same `key` after coming back: it is carried out
once. The same key with another body is `idempotency_conflict`. Keys are kept for 24 hours.

**Pace.** The first text of a reply goes at once, later text every 20 ms or 32 tokens. For a reader with 256 KiB unsent
the server reads no further; when it catches up, deltas may come merged, as `seq_from` to `seq`. One that takes nothing
for 30 s is closed with 1013. Nobody else waits for it.

**Staying.** Send `ping` every `heartbeat_ms`, and after 2 s of silence in a reply; without `pong` in 3 s, connect
again. Pauses before that: full jitter over 0.25 s, doubling to 10 s. Turns go on meanwhile.
"""

CLOSE_CODES: Mapping[int, str] = {
    1000: "the client closed",
    1001: "the other side goes away",
    1005: "no code was given",
    1006: "the line broke",
    1007: "a text message was not UTF-8",
    1009: "a message was larger than `max_message_bytes`",
    1011: "a fault of the server; its log says why",
    1012: "the server restarts",
    1013: "the client read nothing for 30 s",
    4400: "a message was none, or the first was not `hello`",
    4401: "no key, or a wrong one",
    4403: "reserved: not allowed",
    4408: "no `hello` within 10 s",
    4409: "reserved: replaced by another connection",
    4429: "the key has too many connections",
}
_IN_EVERY_SESSION_EVENT = frozenset({"type", "session_id", "seq", "ts"})
FINAL_CLOSE_CODES = frozenset({1000, 1007, 1009, 4400, 4401, 4403, 4409})  # coming back would not help

ERROR_CODES: Mapping[str, str] = {
    "bad_message": "The message is no map, not msgpack or not JSON; the connection is closed.",
    "unknown_type": "There is no such command.",
    "missing_field": "A field is needed: `param` names it.",
    "invalid_value": "A field has a value that it cannot have: `param` names it.",
    "message_too_large": "The message or body is larger than the limit in `welcome`.",
    "session_not_found": "The tenant has no such session.",
    "message_not_found": "The session has no such message.",
    "response_not_found": "The session has no such response.",
    "model_not_found": "That model is not served here.",
    "response_in_progress": "The session has a running response: wait for its end or cancel it.",
    "idempotency_conflict": "The key was used for another body.",
    "unauthorized": "No key, or a wrong one.",
    "forbidden": "The origin or host is not allowed.",
    "not_supported": "A field of OpenAI's interface that is not served here.",
    "context_length_exceeded": "The prompt leaves no room in the context: fork, shorten, or start a new session.",
    "queue_full": "Too much is waiting: try again after `retry_after_ms`.",
    "rate_limited": "The tenant is at a limit: try again after `retry_after_ms`.",
    "server_draining": "The server is about to end: connect again in a moment.",
    "server_interrupted": "The server was interrupted in this: attach again, or ask again.",
    "storage_unavailable": "Redis is away: try again shortly.",
    "internal_error": "A fault of the server; its log says why.",
}


def reference() -> str:
    """All of it."""
    objects = _Objects()
    commands = [objects.section(cls, "validation") for cls in get_args(Command)]
    logged = [objects.section(cls, "serialization") for cls in shapes.SESSION_EVENTS]
    others = [objects.section(cls, "serialization") for cls in shapes.CONNECTION_EVENTS]
    parts = [
        INTRODUCTION,
        "## Commands\n",
        *commands,
        "## Session events\n\nThey stand in the log, and come to whoever follows the session. Each has also "
        "`session_id`, `seq` and `ts` (milliseconds).\n",
        *logged,
        "## Connection events\n\nThey belong to one connection and have no `seq`.\n",
        *others,
        "## Objects\n",
        *objects.sections(),
        _errors(),
        _closes(),
    ]
    return "\n".join(parts)


class _Objects:
    """Sections of messages, and of the objects that they were found to contain."""

    def __init__(self) -> None:
        self._schemas: dict[str, dict[str, Any]] = {}

    def section(self, cls: type, mode: JsonSchemaMode) -> str:
        """One message: its type as the heading, what it means, its fields."""
        schema = TypeAdapter(cls).json_schema(mode=mode)
        self._schemas |= schema.pop("$defs", {})
        name = schema["properties"]["type"]["const"]
        hidden = _IN_EVERY_SESSION_EVENT if cls in shapes.SESSION_EVENTS else ("type",)
        return _section(f"`{name}`", inspect.getdoc(cls) or "", schema, hidden)

    def sections(self) -> list[str]:
        """The objects by name."""
        return [_section(name, schema.get("description", ""), schema) for name, schema in sorted(self._schemas.items())]


def _section(heading: str, text: str, schema: Mapping[str, Any], hidden: Container[str] = ()) -> str:
    required = schema.get("required", ())
    rows = [
        f"| `{name}` | {_type(field)} | {'yes' if name in required or 'const' in field else ''} |"
        for name, field in schema["properties"].items()
        if name not in hidden
    ]
    table = ["| field | value | required |", "| --- | --- | --- |", *rows, ""] if rows else []
    return "\n".join([f"### {heading}\n", f"{text}\n", *table])


def _type(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema or "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    for union in ("anyOf", "oneOf"):
        if union in schema:
            options = [option for option in schema[union] if option != {"type": "null"} or "default" not in schema]
            return " or ".join(dict.fromkeys(_type(option) for option in options))
    return _plain_type(schema) + _bounds(schema)


def _plain_type(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type")
    if kind == "array":
        return f"list of {_type(schema['items'])}"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"map of {_type(values)}" if isinstance(values, Mapping) else "map"
    return str(kind or "any")


def _bounds(schema: Mapping[str, Any]) -> str:
    """What a value may be at least and at most."""
    words = {
        "exclusiveMinimum": "> {}",
        "minimum": ">= {}",
        "exclusiveMaximum": "< {}",
        "maximum": "<= {}",
        "minLength": "at least {} characters",
        "maxLength": "at most {} characters",
        "minItems": "at least {}",
        "maxItems": "at most {}",
        "maxProperties": "at most {}",
    }
    said = [word.format(_number(schema[name])) for name, word in words.items() if _is_telling(schema.get(name))]
    text = re.sub(r"at least (\d+)(?: characters)?, at most", r"\1 to", ", ".join(said))
    return f" ({text})" if said else ""


def _is_telling(bound: Any) -> bool:
    """Whether a bound is one that a client might meet."""
    return bool(bound) and abs(bound) != MAX_SAFE_INTEGER


def _number(value: float) -> str:
    exponent = int(value).bit_length() - 1
    is_power = value > 1 << 15 and value == 1 << exponent
    return f"2^{exponent}" if is_power else re.sub(r"\.0$", "", str(value))


def _errors() -> str:
    rows = [f"| `{code}` | {text} |" for code, text in ERROR_CODES.items()]
    return _table("## Error codes", "In `error.code`, on WebSocket and HTTP alike.", "code", rows)


def _closes() -> str:
    again = {False: "come back", True: "stay away"}
    rows = [f"| {code} | {text} | {again[code in FINAL_CLOSE_CODES]} |" for code, text in CLOSE_CODES.items()]
    lines = ["## Close codes\n", "| code | meaning | client |", "| --- | --- | --- |", *rows, ""]
    return "\n".join(lines)


def _table(heading: str, text: str, name: str, rows: Iterable[str]) -> str:
    return "\n".join([f"{heading}\n", f"{text}\n", f"| {name} | meaning |", "| --- | --- |", *rows, ""])
