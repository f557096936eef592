"""What `POST /v1/responses` takes, in OpenAI's shape, and what it makes of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic_core import to_json

from chatserve.engine.api import SamplingParams
from chatserve.errors import BadRequest
from chatserve.protocol.commands import Metadata
from chatserve.server.openai.content import Conversation, read_conversation
from chatserve.server.openai.fields import (
    AS_MANY_AS_FIT,
    Body,
    Flag,
    Harmless,
    MaxTokens,
    Text,
    Wanted,
    check_model,
    not_supported,
    refuse_unsupported,
    sampling_of,
    validated,
)
from chatserve.sessions.histories import is_dialogue

PLAIN_TEXT = {"type": "text"}
UNSUPPORTED: Harmless = {
    "background": (False,),
    "background_options": (),
    "conversation": (),
    "context_management": ([],),
    "include": ([],),
    "image": (),
    "max_tool_calls": (),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prompt": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning": ({}, {"effort": None}, {"effort": None, "summary": None}),
    "service_tier": ("auto", "default"),
    "stream_options": ({}, {"include_obfuscation": False}),
    "text": ({}, {"format": PLAIN_TEXT}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "access_programs": (),
}


class ResponseBody(Body):
    """The body once it is known to ask for nothing unsupported.

    `user`, `safety_identifier` and `prompt_cache_key` are taken and not used; prefixes are shared without being asked.
    """

    hints: ClassVar[Mapping[str, str]] = {"input": "must be a text or a list of messages"}

    input: Text | list[Any]
    instructions: Text | None = None
    previous_response_id: Annotated[str, Field(strict=True, min_length=1, max_length=128)] | None = None
    store: Flag = True
    max_output_tokens: MaxTokens | None = None
    metadata: Metadata = Field(default_factory=dict)
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None


@dataclass(frozen=True, slots=True)
class WantedResponse:
    """A response, all decided. `asked` are the fields that its object repeats, `body_hash` tells bodies apart.

    `system` is what the input says as the system: it stays for the responses after this one, `instructions` do not.
    """

    conversation: Conversation
    instructions: str
    previous_response_id: str | None
    store: bool
    stream: bool
    max_tokens: int
    sampling: SamplingParams
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    asked: Mapping[str, Any]
    body_hash: str

    @property
    def system(self) -> str:
        """The system messages at the input's beginning."""
        return self.conversation.instructions

    @property
    def as_completion(self) -> Wanted:
        """The same for a response that is not stored."""
        return Wanted(self.max_tokens, self.sampling, self.stop, self.ignore_eos, stream=self.stream)


def read_response(fields: Mapping[str, Any], *, model: str) -> WantedResponse:
    """What a parsed body asks for; without a bound on its length the context is the bound.

    Raises BadRequest that names the field: `not_supported`, `missing_field`, `model_not_found` or `invalid_value`.
    """
    refuse_unsupported(fields, UNSUPPORTED)
    body = validated(ResponseBody, fields, UNSUPPORTED, what="a response")
    check_model(body, model)
    return WantedResponse(
        conversation=_conversation(body.input),
        instructions=body.instructions or "",
        previous_response_id=body.previous_response_id,
        store=body.store,
        stream=body.stream,
        max_tokens=body.max_output_tokens or AS_MANY_AS_FIT,
        sampling=sampling_of(body),
        seed=body.seed,
        stop=body.stop or (),
        ignore_eos=body.ignore_eos,
        asked=_asked(body),
        body_hash=hashlib.sha256(to_json(dict(sorted(fields.items())))).hexdigest(),
    )


def _conversation(given: str | list[Any]) -> Conversation:
    """The input's messages, which must be a session's: user and assistant in turns, each of the user with a text."""
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    conversation = read_conversation(items, "input")
    num_system = len(items) - len(conversation.said)
    if not is_dialogue(conversation.said):
        raise not_supported(
            "input", "after opening system messages let user and assistant take turns, beginning with user"
        )
    for index, message in enumerate(conversation.said, num_system):
        if not message.text:
            param = "input" if isinstance(given, str) else f"input.{index}.content"
            raise BadRequest(f"{param!r} is empty: say something", param=param)
    return conversation


def _asked(body: ResponseBody) -> dict[str, Any]:
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "previous_response_id": body.previous_response_id,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "store": body.store,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "user": body.user,
    }
