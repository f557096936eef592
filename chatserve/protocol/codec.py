"""Bytes to commands and events to bytes, in both encodings of protocol `chatserve.v1`. No I/O.

Whatever arrives, `decode_command` gives a command or raises a `ServiceError` that names the field, shows the value
shortened and says what to send instead. The wire form of an event, in the log and on msgpack connections alike, is
msgpack; JSON is made from it on the way out.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import msgpack
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json

from chatserve.errors import BadRequest, MessageTooLarge
from chatserve.protocol import commands
from chatserve.protocol.commands import Command

Encoding = Literal["msgpack", "json"]
MAX_MESSAGE_BYTES = 1 << 20

_ADAPTERS: dict[str, TypeAdapter[Any]] = {
    cls.__dataclass_fields__["type"].default: TypeAdapter(cls) for cls in get_args(commands.Command)
}
_UNION_TAG = ("union_tag_not_found", "union_tag_invalid")
_MISSING = ("missing", "union_tag_not_found")
_UNKNOWN_FIELD = ("unexpected_keyword_argument", "extra_forbidden")


def decode_command(data: bytes | str, encoding: Encoding, *, max_bytes: int = MAX_MESSAGE_BYTES) -> Command:
    """The command in one WebSocket message: bytes for msgpack, text for JSON.

    Raises `MessageTooLarge`, or `BadRequest` with code `bad_message`, `unknown_type`, `missing_field` or
    `invalid_value`.
    """
    num_bytes = len(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
    if num_bytes > max_bytes:
        raise MessageTooLarge(f"the message has {num_bytes} bytes; at most {max_bytes} are accepted: send less at once")
    return command_from(_parse_msgpack(data) if encoding == "msgpack" else _parse_json(data))


def command_from(data: object) -> Command:
    """The command in an already parsed map, for surfaces that take commands apart otherwise (HTTP bodies).

    Raises `BadRequest` as `decode_command` does.
    """
    if not isinstance(data, dict):
        raise _bad_message(f"a command is a map with a 'type'; got {_shown(data)}")
    command_id = _readable_id(data.get("id"))
    name = _command_type(data, command_id)
    try:
        return cast(Command, _ADAPTERS[name].validate_python(data))
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0], data, name, command_id) from None


def encode(event: Mapping[str, Any], encoding: Encoding) -> bytes | str:
    """An event as one WebSocket message: msgpack bytes or JSON text."""
    return to_wire(event) if encoding == "msgpack" else _to_json(event)


def to_wire(event: Mapping[str, Any]) -> bytes:
    """An event as msgpack: the form that the log keeps."""
    return cast(bytes, msgpack.packb(event, use_bin_type=True))


def from_wire(wire: bytes) -> dict[str, Any]:
    """The event in a log entry's bytes."""
    return cast(dict[str, Any], msgpack.unpackb(wire, raw=False))


def wire_to(encoding: Encoding, wire: bytes) -> bytes | str:
    """A log entry's bytes as one WebSocket message; for msgpack they are that message already."""
    return wire if encoding == "msgpack" else _to_json(from_wire(wire))


def _to_json(event: Mapping[str, Any]) -> str:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _parse_msgpack(data: bytes | str) -> object:
    if isinstance(data, str):
        raise _bad_message("got a text message, but msgpack travels in binary ones")
    try:
        _check_complete(data)
        return msgpack.unpackb(data, raw=False, max_ext_len=0)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise _bad_message(f"the message is not msgpack: {_reason(error)}") from None


def _check_complete(data: bytes) -> None:
    """Walk over the message without building it: a header may claim 2**32 elements, and unpacking believes it."""
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(data), 1))
    unpacker.feed(data)
    unpacker.skip()
    if unpacker.tell() != len(data):
        raise ValueError(f"{len(data) - unpacker.tell()} bytes follow the first value")


def _parse_json(data: bytes | str) -> object:
    if not isinstance(data, str):
        raise _bad_message("got a binary message, but JSON travels in text ones")
    try:
        return from_json(data, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise _bad_message(f"the message is not JSON: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return _shortened(str(error) or type(error).__name__, 120)


def _bad_message(text: str) -> BadRequest:
    return BadRequest(text, code="bad_message")


def _readable_id(value: object) -> str | None:
    """The command's id where it can be given back to the client as it is."""
    if not isinstance(value, str) or not 1 <= len(value) <= 64:
        return None
    return None if any("\ud800" <= char <= "\udfff" for char in value) else value


def _command_type(data: dict[Any, Any], command_id: str | None) -> str:
    known = ", ".join(_ADAPTERS)
    if "type" not in data:
        raise BadRequest(
            f"the command has no 'type'; send one of: {known}",
            code="missing_field",
            param="type",
            command_id=command_id,
        )
    name = data["type"]
    if not isinstance(name, str) or name not in _ADAPTERS:
        raise BadRequest(
            f"there is no command {_shown(name)}; send one of: {known}",
            code="unknown_type",
            param="type",
            command_id=command_id,
        )
    return name


def _refusal(error: ErrorDetails, data: dict[Any, Any], name: str, command_id: str | None) -> BadRequest:
    param = _shortened(_param(error, data), 120)
    if error["type"] in _MISSING:
        text = f"{name} needs '{param}': add it"
        return BadRequest(text, code="missing_field", param=param, command_id=command_id)
    if error["type"] in _UNKNOWN_FIELD or error["type"] == "invalid_key":
        text = f"{name} has no field '{param}': remove it"
    else:
        text = f"'{param}' of {name}: {_expectation(error)}; got {_shown(error['input'])}"
    return BadRequest(text, code="invalid_value", param=param, command_id=command_id)


def _expectation(error: ErrorDetails) -> str:
    text = error["msg"].removeprefix("Value error, ").replace(" after validation", "").replace("valid tuple", "list")
    return _shortened(text[:1].lower() + text[1:], 200)


def _param(error: ErrorDetails, data: object) -> str:
    """The path of the value at fault, as the client wrote it: without the names of pydantic's union branches."""
    path = error["loc"]
    if error["type"] in _UNION_TAG:
        path = (*path, "type")
    absent = error["type"] in _MISSING
    steps = []
    value = data
    for position, step in enumerate(path):
        found, value = _descend(value, step)
        if found or (absent and position == len(path) - 1):
            steps.append(_shortened(str(step), 64))
    return ".".join(steps)


def _descend(value: object, step: int | str) -> tuple[bool, object]:
    if isinstance(value, dict) and step in value:
        return True, value[step]
    if isinstance(value, list) and isinstance(step, int) and step < len(value):
        return True, value[step]
    return False, value


_shortener = reprlib.Repr()
_shortener.maxlevel = 2
_shortener.maxlist = _shortener.maxdict = 3
_shortener.maxstring = _shortener.maxother = _shortener.maxlong = 48


def _shown(value: object) -> str:
    """The value as a client would recognise it, in at most some 100 characters however large or deep it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return "a very large integer"
    return _shortened(_shortener.repr(value), 100)


def _shortened(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"
