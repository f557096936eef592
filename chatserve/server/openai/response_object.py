"""The response object in OpenAI's shape, and the ids it goes by.

A stored response is a turn of a session: its public id is made of the session's id and the response's own, so that it
is found again without an index. No I/O.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from chatserve.errors import NotFound
from chatserve.sessions.conversations import StoredResponse
from chatserve.storage.session_store import MessageRecord

_ULID = "[0-9a-z]{26}"
_PUBLIC_ID = re.compile(f"resp_({_ULID})({_ULID})")
NOTHING_ASKED: Mapping[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "previous_response_id": None,
    "safety_identifier": None,
    "prompt_cache_key": None,
    "store": True,
    "temperature": None,
    "top_p": None,
    "user": None,
}
ALWAYS: Mapping[str, Any] = {
    "background": False,
    "max_tool_calls": None,
    "parallel_tool_calls": True,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "truncation": "disabled",
}


def public_id(session_id: str, response_id: str) -> str:
    """The id by which a session's response is known on this surface."""
    return f"resp_{session_id.removeprefix('sess_')}{response_id.removeprefix('resp_')}"


def private_ids(response_id: str, param: str) -> tuple[str, str]:
    """The ids of the session and of the response in it. Raises NotFound where there can be none."""
    match = _PUBLIC_ID.fullmatch(response_id)
    if match is None:
        raise no_response(response_id, param)
    return f"sess_{match[1]}", f"resp_{match[2]}"


def no_response(response_id: str, param: str) -> NotFound:
    """There is no such response, or not any more, or it is somebody else's."""
    return NotFound(f"there is no stored response {response_id!r}", code="response_not_found", param=param)


def response_object(
    *,
    response_id: str,
    message_id: str,
    created_at: int,
    model: str,
    asked: Mapping[str, Any],
    status: str,
    text: str | None = None,
    usage: Mapping[str, Any] | None = None,
    error: Mapping[str, Any] | None = None,
    is_cut: bool = False,
) -> dict[str, Any]:
    """The object; `created_at` in seconds. A text of None is none yet; `is_cut` says that it ends at a limit."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "status": status,
        "error": error and {"code": error["code"], "message": error["message"]},
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "model": model,
        "output": [] if text is None else [output_item(message_id, status, text)],
        "usage": usage and _usage(usage),
        **ALWAYS,
        **NOTHING_ASKED,
        **asked,
    }


def output_item(message_id: str, status: str, text: str | None) -> dict[str, Any]:
    """The reply as an output item; without a text it has no content yet."""
    return {
        "id": message_id,
        "type": "message",
        "status": status if status in ("in_progress", "completed") else "incomplete",
        "role": "assistant",
        "content": [] if text is None else [output_text(text)],
    }


def output_text(text: str) -> dict[str, Any]:
    """The one part of a reply."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def input_item(message: MessageRecord) -> dict[str, Any]:
    """A message that a response answers, or that was said before, as an input item."""
    if message.role == "assistant":
        return output_item(message.id, "completed", message.text)
    content = [{"type": "input_text", "text": message.text}]
    return {"id": message.id, "type": "message", "status": "completed", "role": "user", "content": content}


def object_of(found: StoredResponse) -> dict[str, Any]:
    """The object of a stored response as it stands; turns that other surfaces asked for have one, too."""
    response = found.response
    asked = (found.reply.request or {}).get("asked", {"instructions": found.instructions or None})
    return response_object(
        response_id=public_id(found.session_id, found.inner_id),
        message_id=found.reply.id,
        created_at=found.reply.created_at // 1000,
        model=response["model"],
        asked=asked,
        status=response["status"],
        text=found.reply.text or (None if response["status"] in ("in_progress", "failed") else ""),
        usage=response.get("usage"),
        error=response.get("error"),
        is_cut=response["status"] == "incomplete",
    )


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["input_tokens"],
        "input_tokens_details": {"cached_tokens": usage["input_tokens_details"]["cached_tokens"]},
        "output_tokens": usage["output_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
