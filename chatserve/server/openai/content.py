"""Messages in OpenAI's shapes, of chat completions and responses alike, to roles and texts.

What a message carries besides text is refused with its place, such as `messages.2.content.0.type`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chatserve.errors import BadRequest
from chatserve.server.openai.fields import Harmless, not_supported, refuse_unsupported
from chatserve.text.pipeline import PathMessage

MAX_MESSAGES = 8192
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
OTHER_ROLES = ("tool", "function", "critic", "discriminator")
TEXT_TYPES = ("text", "input_text", "output_text")

# What a client gets with a message of ours and sends back as it is.
MESSAGE_FIELDS: Harmless = {
    "name": (),
    "refusal": (),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "annotations": ([],),
    "phase": (),
}
PART_FIELDS: Harmless = {"annotations": ([],), "logprobs": ([],)}
UNUSED_FIELDS = ("id", "status", "type")  # a response's output sent back names itself


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was said, by user and assistant in the end, and the instructions before all of it."""

    instructions: str
    said: tuple[PathMessage, ...]


def read_conversation(items: Sequence[Any], param: str) -> Conversation:
    """The messages in a body's field `param`; those of the system at the beginning are its instructions.

    Raises BadRequest that names the place. The last message must be the user's.
    """
    if len(items) > MAX_MESSAGES:
        raise BadRequest(f"{param!r} has {len(items)} messages; at most {MAX_MESSAGES} are taken", param=param)
    messages = [_message(item, f"{param}.{index}") for index, item in enumerate(items)]
    if not messages or messages[-1].role != "user":
        raise BadRequest(f"{param!r} must end with a user's message, which is what is answered", param=param)
    num_system = next(index for index, message in enumerate(messages) if message.role != "system")
    instructions = "\n\n".join(message.text for message in messages[:num_system])
    return Conversation(instructions, tuple(messages[num_system:]))


def _message(item: Any, place: str) -> PathMessage:
    if not isinstance(item, dict):
        raise BadRequest(f"{place!r} must be a message with 'role' and 'content'", param=place)
    if item.get("type", "message") != "message":
        raise not_supported(f"{place}.type", "send messages only")
    refuse_unsupported(item, MESSAGE_FIELDS, f"{place}.")
    _refuse_unknown(item, {"role", "content", *MESSAGE_FIELDS, *UNUSED_FIELDS}, place)
    return PathMessage(_role(item.get("role"), place), _text(item.get("content"), f"{place}.content"), ())


def _role(role: Any, place: str) -> str:
    if role in OTHER_ROLES:
        raise not_supported(f"{place}.role", f"{role!r} is a role of tools; use {', '.join(ROLES)}")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRequest(f"'{place}.role' must be one of {', '.join(ROLES)}", param=f"{place}.role")
    return ROLES[role]


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise BadRequest(f"{place!r} must be a text or a list of text parts", param=place)
    return "".join(_part(part, f"{place}.{index}") for index, part in enumerate(content))


def _part(part: Any, place: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise BadRequest(f"{place!r} must be a text part with 'type' and 'text'", param=place)
    if part["type"] not in TEXT_TYPES:
        raise not_supported(f"{place}.type", "send text parts only")
    refuse_unsupported(part, PART_FIELDS, f"{place}.")
    _refuse_unknown(part, {"type", "text", *PART_FIELDS}, place)
    text = part.get("text")
    if not isinstance(text, str):
        raise BadRequest(f"'{place}.text' must be a text", param=f"{place}.text")
    return text


def _refuse_unknown(item: dict[str, Any], known: set[str], place: str) -> None:
    for name in item:
        if name not in known and item[name] is not None:
            raise BadRequest(f"there is no field '{place}.{name}': remove it", param=f"{place}.{name}")
