"""What `POST /v1/completions` takes, in OpenAI's shape with vLLM's additions, and what it makes of it.

It only reads and decides; running the request is `completions`' work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from chatserve.errors import BadRequest
from chatserve.protocol.commands import MAX_INPUT_TOKEN_IDS, TokenId
from chatserve.server.openai.fields import (
    CompletionFields,
    Harmless,
    MaxTokens,
    Wanted,
    check_model,
    check_stream_options,
    refuse_unsupported,
    validated,
    wanted_of,
)

DEFAULT_MAX_TOKENS = 16

UNSUPPORTED: Harmless = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "prompt_logprobs": (),
    "suffix": (),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
}

TokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_INPUT_TOKEN_IDS)]
Prompt = Annotated[str, Field(strict=True, min_length=1)] | TokenIds


class CompletionBody(CompletionFields):
    """The body once it is known to ask for nothing unsupported."""

    hints: ClassVar[Mapping[str, str]] = {"prompt": "must be a text or a list of token ids, not empty"}

    prompt: Prompt
    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS


def read_body(fields: Mapping[str, Any], *, model: str, vocab_size: int) -> tuple[str | tuple[int, ...], Wanted]:
    """The prompt, as text or token ids, and what a parsed body asks for.

    Raises BadRequest that names the field: `not_supported`, `missing_field`, `model_not_found` or `invalid_value`.
    """
    refuse_unsupported(fields, UNSUPPORTED)
    given = {**fields, "prompt": _one_prompt(fields.get("prompt"))}
    body = validated(CompletionBody, given, UNSUPPORTED, what="a completion")
    check_model(body, model)
    check_stream_options(body)
    if not isinstance(body.prompt, str) and max(body.prompt) >= vocab_size:
        text = f"token id {max(body.prompt)} is not in the vocabulary: ids are below {vocab_size}"
        raise BadRequest(text, param="prompt")
    return body.prompt, wanted_of(body, body.max_tokens)


def _one_prompt(prompt: Any) -> Any:
    """The prompt itself where it came in a list of one."""
    is_list_of_prompts = isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list))
    if is_list_of_prompts and len(prompt) > 1:
        text = f"{len(prompt)} prompts in one request are not supported: send one request for each"
        raise BadRequest(text, code="not_supported", param="prompt")
    return prompt[0] if is_list_of_prompts else prompt
