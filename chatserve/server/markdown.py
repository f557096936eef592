"""A session's present branch as Markdown, for people to read.

Messages stand as they were written, which is often Markdown itself; only what surrounds them is ours. What a message
leaves open does not swallow those behind it, and a title cannot say more than a title.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

_SPEAKERS = {"user": "User", "assistant": "Assistant"}
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~-])")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")


def session_markdown(document: Mapping[str, Any]) -> str:
    """The messages from the first one to the head of an exported session, each under its speaker."""
    session = document["session"]
    parts = [f"# {_escaped(session['title']) or 'Untitled session'}", _origin(document)]
    if session["instructions"]:
        parts += ["## Instructions", _closed(session["instructions"])]
    for message in _branch(document):
        parts += [f"## {_SPEAKERS[message['role']]}", _closed(message["text"])]
    return "\n\n".join(parts) + "\n"


def _origin(document: Mapping[str, Any]) -> str:
    exported = datetime.fromtimestamp(document["exported_at"] / 1000, UTC)
    return f"Exported {exported:%Y-%m-%d %H:%M} UTC, model {_escaped(document['model']['id'])}"


def _branch(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    messages = {message["id"]: message for message in document["messages"]}
    branch = []
    message = messages.get(document["session"]["head_id"])
    while message is not None:
        branch.append(message)
        message = messages.get(message["parent_id"])
    return branch[::-1]


def _escaped(text: str) -> str:
    """Text on one line in which nothing is markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _closed(text: str) -> str:
    """The text, with a code block that it leaves open closed."""
    fence = ""
    for line in text.splitlines():
        found = _FENCE.match(line)
        if found is None:
            continue
        if not fence:
            fence = found[1]
        elif found[1].startswith(fence) and not found[2].strip():
            fence = ""
    return f"{text}\n{fence}" if fence else text
