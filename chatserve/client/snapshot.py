"""What a session's snapshot says, as programs want to read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def branch(snapshot: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages from the first one to the branch head, in order; other branches are left out."""
    messages = {message["id"]: message for message in snapshot["messages"]}
    path = []
    message = messages.get(snapshot.get("head_id"))
    while message is not None:
        path.append(message)
        message = messages.get(message.get("parent_id"))
    return path[::-1]


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message."""
    return "".join(part.get("text", "") for part in message["content"])
