"""A response as OpenAI's server-sent events, each with its name and its number in the stream. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json

from chatserve.errors import ServiceError
from chatserve.server.openai.response_object import output_item, output_text

# OpenAI has no event for a cancelled response: the object's status tells it from one that ran into a limit.
TERMINAL = {
    "completed": "response.completed",
    "incomplete": "response.incomplete",
    "cancelled": "response.incomplete",
    "failed": "response.failed",
}


class ResponseEvents:
    """The events of one response with one message, `message_id`, in their order."""

    def __init__(self, message_id: str) -> None:
        self._message_id = message_id
        self._part = {"item_id": message_id, "output_index": 0, "content_index": 0}
        self._num_sent = 0

    def opening(self, response: Mapping[str, Any]) -> bytes:
        """What comes before any text; `response` is the object in progress, without output."""
        item = output_item(self._message_id, "in_progress", None)
        return (
            self._event("response.created", response=response)
            + self._event("response.in_progress", response=response)
            + self._event("response.output_item.added", output_index=0, item=item)
            + self._event("response.content_part.added", **self._part, part=output_text(""))
        )

    def delta(self, text: str) -> bytes:
        """More text."""
        return self._event("response.output_text.delta", **self._part, delta=text, logprobs=[]) if text else b""

    def ending(self, response: Mapping[str, Any]) -> bytes:
        """What comes behind the text; `response` is the final object. Of one that failed that alone is told."""
        done = b"" if response["status"] == "failed" else self._done(response["output"][0])
        return done + self._event(TERMINAL[response["status"]], response=response)

    def failure(self, error: ServiceError) -> bytes:
        """The stream breaks off; whether the response does, its object says."""
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def _done(self, item: Mapping[str, Any]) -> bytes:
        part = item["content"][0]
        return (
            self._event("response.output_text.done", **self._part, text=part["text"], logprobs=[])
            + self._event("response.content_part.done", **self._part, part=part)
            + self._event("response.output_item.done", output_index=0, item=item)
        )

    def _event(self, name: str, **fields: Any) -> bytes:
        data = to_json({"type": name, "sequence_number": self._num_sent, **fields})
        self._num_sent += 1
        return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
