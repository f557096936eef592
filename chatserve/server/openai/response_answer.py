"""A response that is not stored, told as its completion goes on; see `streaming.Answer`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from chatserve.errors import ServiceError
from chatserve.server.openai.completing import Completion, Piece
from chatserve.server.openai.response_events import ResponseEvents
from chatserve.server.openai.response_object import response_object


class ResponseAnswer:
    """The objects and events of one response; `asked` are the fields that its object repeats."""

    def __init__(self, completion: Completion, model: str, asked: Mapping[str, Any]) -> None:
        self.completion = completion
        self._model = model
        self._asked = asked
        self._message_id = completion.id.replace("resp_", "msg_", 1)
        self._created_at = int(time.time())
        self._events = ResponseEvents(self._message_id)
        self._pieces: list[Piece] = []

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The object of a response that is no stream."""
        is_cut = pieces[-1].finish_reason == "length"
        return self._object(
            "incomplete" if is_cut else "completed",
            text="".join(piece.text for piece in pieces),
            usage=self._usage(),
            is_cut=is_cut,
        )

    def chunk(self, piece: Piece, *, is_first: bool) -> bytes:
        """The beginning with the first piece, then text."""
        self._pieces.append(piece)
        opening = self._events.opening(self._object("in_progress")) if is_first else b""
        return opening + self._events.delta(piece.text)

    def ending(self) -> bytes:
        """The whole text and the final object."""
        return self._events.ending(self.whole(self._pieces))

    def failure(self, error: ServiceError) -> bytes:
        """The final object, which says why."""
        return self._events.ending(self._object("failed", usage=self._usage(), error=error.as_object()))

    def _object(self, status: str, **fields: Any) -> dict[str, Any]:
        return response_object(
            response_id=self.completion.id,
            message_id=self._message_id,
            created_at=self._created_at,
            model=self._model,
            asked=self._asked,
            status=status,
            **fields,
        )

    def _usage(self) -> dict[str, Any]:
        num_input, num_output = len(self.completion.prompt_ids), self.completion.num_generated
        return {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": self.completion.num_cached},
            "output_tokens": num_output,
            "total_tokens": num_input + num_output,
        }
