"""The tree of messages: ways from its root to a message, and what may be asked of a message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from chatserve.errors import BadRequest, NotFound
from chatserve.storage.session_store import MessageRecord
from chatserve.text.pipeline import PathMessage

ROOT = "root"  # as a parent_id: before the first message
Messages = Mapping[str, MessageRecord]


def find_message(messages: Messages, message_id: str, param: str) -> MessageRecord:
    """The message, or NotFound naming the field that asked for it."""
    message = messages.get(message_id)
    if message is None:
        raise NotFound(
            f"the session has no message {message_id!r}; attach again to see its messages",
            code="message_not_found",
            param=param,
        )
    return message


def parent_of_turn(
    messages: Messages, head_id: str | None, parent_id: str | None, *, has_input: bool
) -> MessageRecord | None:
    """What a new turn hangs on; None is the root. Raises NotFound, or BadRequest where the combination makes no turn.

    With input that is a reply or the root; without, a user message (its answer is made again) or an unfinished reply
    (it goes on).
    """
    chosen = head_id if parent_id is None else parent_id
    parent = None if chosen is None or chosen == ROOT else find_message(messages, chosen, "parent_id")
    if has_input and parent is not None and parent.role == "user":
        raise BadRequest(
            f"message {parent.id!r} is a user message: leave 'input' out to answer it again, "
            "or give the message before it as 'parent_id' to say something else in its place",
            param="parent_id",
        )
    if not has_input and parent is None:
        raise BadRequest("there is no message to answer yet: send 'input'", code="missing_field", param="input")
    if not has_input and parent is not None and not _can_go_on(parent):
        raise BadRequest(
            f"reply {parent.id!r} has come to its end: send 'input', or give the user message before it as 'parent_id' "
            "to have it answered again",
            param="parent_id",
        )
    return parent


def _can_go_on(message: MessageRecord) -> bool:
    """Whether a reply can follow directly: behind a user message, or where ids that are not an end stand last."""
    return message.role == "user" or (message.state != "complete" and not message.pending_text)


def path_to(messages: Messages, message: MessageRecord | None) -> list[MessageRecord]:
    """The messages from the first one to this, in order."""
    path: list[MessageRecord] = []
    while message is not None:
        path.append(message)
        message = messages[message.parent_id] if message.parent_id else None
    return path[::-1]


def prompt_path(messages: Messages, path: Sequence[MessageRecord], model: str) -> list[PathMessage]:
    """The path as the text pipeline reads it; ids that another model made are marked foreign.

    A user's message was rendered for the model of the first reply to it.
    """
    first_model: dict[str, str] = {}
    for message in messages.values():
        if message.role == "assistant" and message.parent_id:
            first_model.setdefault(message.parent_id, model_of(message, model))
    return [
        PathMessage(
            role=message.role,
            text=message.text,
            token_ids=message.token_ids,
            pending_text=message.pending_text,
            foreign=(model_of(message, model) if message.role == "assistant" else first_model.get(message.id, model))
            != model,
        )
        for message in path
    ]


def model_of(message: MessageRecord, default: str) -> str:
    """The model that made a reply."""
    model: str = (message.response or {}).get("model", default)
    return model
