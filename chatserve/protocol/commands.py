"""The commands of protocol `chatserve.v1` as frozen dataclasses, every field typed strictly and bounded.

An absent optional field and a null are the same: None, "not given". This module only says what a command looks like;
turning bytes into one, and saying what is wrong with them, is `codec`'s work.
"""

from __future__ import annotations

from dataclasses import field, fields
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

MAX_SESSIONS_PER_CONNECTION = 32
MAX_TEXT_CHARS = 1 << 20
MAX_INPUT_PARTS = 64
MAX_INPUT_TOKEN_IDS = 1 << 18
MAX_SAFE_INTEGER = (1 << 53) - 1  # what JavaScript holds exactly

_T = TypeVar("_T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def _message(cls: type[_T]) -> type[_T]:
    """Make a frozen, slotted, keyword-only dataclass that validates its fields and refuses unknown ones."""
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    return cast(type[_T], pydantic_dataclass(cls, frozen=True, slots=True, kw_only=True, config=config))


def _one_as_list(value: object) -> object:
    """A single stop string is a list of one."""
    return [value] if isinstance(value, str) else value


def _text_as_parts(value: object) -> object:
    """A plain string is one text part."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _token_ids_alone(parts: tuple[InputPart, ...]) -> tuple[InputPart, ...]:
    if len(parts) > 1 and any(isinstance(part, TokenIdsPart) for part in parts):
        raise ValueError("a token_ids part must be the only part of the input")
    return parts


def _text(min_chars: int, max_chars: int) -> Any:
    return Field(strict=True, min_length=min_chars, max_length=max_chars)


Id = Annotated[str, _text(1, 64)]
Key = Annotated[str, _text(1, 64)]
Title = Annotated[str, _text(0, 200)]
Name = Annotated[str, _text(0, 64)]
LongText = Annotated[str, _text(0, MAX_TEXT_CHARS)]
Flag = Annotated[bool, Field(strict=True)]
Counter = Annotated[int, Field(strict=True, ge=0, le=MAX_SAFE_INTEGER)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
Metadata = Annotated[
    dict[Annotated[str, _text(1, 64)], Annotated[str, _text(0, 512)]],
    Field(max_length=16),
]

Temperature = Annotated[float, Field(strict=True, ge=0, le=2)]
TopP = Annotated[float, Field(strict=True, gt=0, le=1)]
TopK = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
MinP = Annotated[float, Field(strict=True, ge=0, le=1)]
MaxOutputTokens = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]
_Stops = Annotated[tuple[Annotated[str, _text(1, 256)], ...], Field(min_length=1, max_length=8)]
Stop = Annotated[_Stops, BeforeValidator(_one_as_list, json_schema_input_type=str | _Stops)]


@_message
class Params:
    """Sampling settings; None leaves the choice to the session, then to the server.

    `stop` may be sent as one string; it arrives here as a tuple. `temperature` 0 is greedy.
    """

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    max_output_tokens: MaxOutputTokens | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    ignore_eos: Flag | None = None


def given_params(params: Params) -> dict[str, Any]:
    """The sampling settings that were given, as plain values for storing; also of a `ResponseCreate`."""
    values = {entry.name: getattr(params, entry.name) for entry in fields(Params)}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {name: value for name, value in plain.items() if value is not None}


@_message
class TextPart:
    """Text of the user's message; control tokens written in it stay text."""

    text: Annotated[str, _text(1, MAX_TEXT_CHARS)]
    type: Literal["text"] = "text"


@_message
class TokenIdsPart:
    """The user's message as token ids, taken as they are."""

    token_ids: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_INPUT_TOKEN_IDS)]
    type: Literal["token_ids"] = "token_ids"


InputPart = TextPart | TokenIdsPart
_Parts = Annotated[
    tuple[Annotated[InputPart, Field(discriminator="type")], ...], Field(min_length=1, max_length=MAX_INPUT_PARTS)
]
Input = Annotated[
    _Parts,
    BeforeValidator(_text_as_parts, json_schema_input_type=str | _Parts),
    AfterValidator(_token_ids_alone),
]


@_message
class ClientInfo:
    """What the client calls itself; for logs only."""

    name: Name
    version: Name


@_message
class ResumeEntry:
    """One session the client followed before, and the last event it applied."""

    session_id: Id
    epoch: Counter
    after_seq: Counter


@_message
class Hello:
    """The first command of a connection. An `id` is echoed in an error only; the answer is `welcome`."""

    client: ClientInfo
    token: Annotated[str, _text(0, 1024)] | None = None
    resume: Annotated[tuple[ResumeEntry, ...], Field(max_length=MAX_SESSIONS_PER_CONNECTION)] = ()
    id: Id | None = None
    type: Literal["hello"] = "hello"


@_message
class SessionCreate:
    """Make a session. `key` makes a repeated command harmless."""

    id: Id
    key: Key
    title: Title | None = None
    instructions: LongText | None = None
    metadata: Metadata | None = None
    params: Params | None = None
    type: Literal["session.create"] = "session.create"


@_message
class SessionAttach:
    """Follow a session. Without `after_seq`: a snapshot at the head, then what follows; 0: the whole log."""

    id: Id
    session_id: Id
    epoch: Counter | None = None
    after_seq: Counter | None = None
    type: Literal["session.attach"] = "session.attach"


@_message
class SessionDetach:
    """Stop following a session."""

    id: Id
    session_id: Id
    type: Literal["session.detach"] = "session.detach"


@_message
class SessionUpdate:
    """Change what is given, leave the rest. `head_id` switches the branch."""

    id: Id
    session_id: Id
    title: Title | None = None
    metadata: Metadata | None = None
    params: Params | None = None
    head_id: Id | None = None
    archived: Flag | None = None
    pinned: Flag | None = None
    type: Literal["session.update"] = "session.update"


@_message
class SessionDelete:
    """Delete a session with everything it holds."""

    id: Id
    session_id: Id
    type: Literal["session.delete"] = "session.delete"


@_message
class SessionFork:
    """Make a session that begins like this one, up to and including a message."""

    id: Id
    session_id: Id
    at_message_id: Id
    key: Key
    title: Title | None = None
    type: Literal["session.fork"] = "session.fork"


@_message
class ResponseCreate(Params):
    """Send, edit, regenerate or continue, by which of `input` and `parent_id` are given.

    A string sent as `input` arrives here as one text part.
    """

    id: Id
    session_id: Id
    key: Key
    parent_id: Id | None = None
    input: Input | None = None
    type: Literal["response.create"] = "response.create"


@_message
class ResponseCancel:
    """End a response early; what it said so far is kept."""

    id: Id
    session_id: Id
    response_id: Id
    type: Literal["response.cancel"] = "response.cancel"


@_message
class SessionTyping:
    """A hint that a turn is coming. It has no answer; an `id` is echoed in an error only."""

    session_id: Id
    id: Id | None = None
    type: Literal["session.typing"] = "session.typing"


@_message
class Ping:
    """Answered by `pong` with the same `t`. An `id` is echoed in an error only."""

    t: Annotated[float, Field(strict=True, ge=-MAX_SAFE_INTEGER, le=MAX_SAFE_INTEGER)]
    id: Id | None = None
    type: Literal["ping"] = "ping"


Command = (
    Hello
    | SessionCreate
    | SessionAttach
    | SessionDetach
    | SessionUpdate
    | SessionDelete
    | SessionFork
    | ResponseCreate
    | ResponseCancel
    | SessionTyping
    | Ping
)
