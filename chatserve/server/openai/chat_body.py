"""What `POST /v1/chat/completions` takes, in OpenAI's shape with vLLM's additions, and what it makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from chatserve.errors import BadRequest
from chatserve.server.openai.content import Conversation, read_conversation
from chatserve.server.openai.fields import (
    AS_MANY_AS_FIT,
    CompletionFields,
    Harmless,
    MaxTokens,
    Text,
    Wanted,
    check_model,
    check_stream_options,
    refuse_unsupported,
    validated,
    wanted_of,
)

UNSUPPORTED: Harmless = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "store": (False,),
    "metadata": ({},),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "service_tier": ("auto", "default"),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
}


class ChatBody(CompletionFields):
    """The body once it is known to ask for nothing unsupported.

    `safety_identifier` and `prompt_cache_key` are taken and not used: prefixes are shared without being asked.
    """

    messages: Annotated[list[Any], Field(min_length=1)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None


def read_chat(fields: Mapping[str, Any], *, model: str) -> tuple[Conversation, Wanted]:
    """The conversation and what a parsed body asks for; without a bound on its length the context is the bound.

    Raises BadRequest that names the field: `not_supported`, `missing_field`, `model_not_found` or `invalid_value`.
    """
    refuse_unsupported(fields, UNSUPPORTED)
    body = validated(ChatBody, fields, UNSUPPORTED, what="a chat completion")
    check_model(body, model)
    check_stream_options(body)
    return read_conversation(body.messages, "messages"), wanted_of(body, _max_tokens(body))


def _max_tokens(body: ChatBody) -> int:
    given = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(given) > 1:
        raise BadRequest(
            "max_tokens and max_completion_tokens differ: send max_completion_tokens alone", param="max_tokens"
        )
    return next((count for count in given if count), AS_MANY_AS_FIT)
