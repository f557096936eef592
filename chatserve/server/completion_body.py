"""What `POST /v1/completions` takes, in OpenAI's shape with vLLM's additions, and what it makes of it.

It only reads and decides; running the request is `completions`' work.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from chatserve.engine.api import SamplingParams
from chatserve.errors import BadRequest
from chatserve.protocol.commands import MAX_INPUT_TOKEN_IDS, MinP, Seed, Stop, Temperature, TokenId, TopP

DEFAULT_MAX_TOKENS = 16
MAX_SEED = 1 << 32

# Fields that OpenAI or vLLM know and this server does not: the value that asks for nothing, besides null.
UNSUPPORTED: Mapping[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": None,
    "prompt_logprobs": None,
    "suffix": None,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
}

TokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_INPUT_TOKEN_IDS)]
Prompt = Annotated[str, Field(strict=True, min_length=1)] | TokenIds
Flag = Annotated[bool, Field(strict=True)]


def _no_stop(value: object) -> object:
    return value or None


def _unbounded_top_k(value: object) -> object:
    """vLLM writes "off" as -1, too."""
    return 0 if value == -1 and not isinstance(value, bool) else value


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: Flag = False


class CompletionBody(BaseModel):
    """The body once it is known to ask for nothing unsupported. `user` is taken and not used."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompt: Prompt
    model: Annotated[str, Field(strict=True)] | None = None
    max_tokens: Annotated[int, Field(strict=True, ge=1, le=1 << 20)] = DEFAULT_MAX_TOKENS
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Annotated[int, BeforeValidator(_unbounded_top_k), Field(strict=True, ge=0, lt=1 << 31)] = 0
    min_p: MinP = 0.0
    seed: Seed | None = None
    stop: Annotated[Stop | None, BeforeValidator(_no_stop)] = None
    stream: Flag = False
    stream_options: StreamOptions | None = None
    ignore_eos: Flag = False
    return_token_ids: Flag = False
    user: Annotated[str, Field(strict=True)] | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """A completion, all decided: the prompt as text or token ids, how to sample, and what the answer carries."""

    prompt: str | tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool
    return_token_ids: bool


def read_body(fields: Mapping[str, Any], *, model: str, vocab_size: int) -> Wanted:
    """The completion that a parsed body asks for; a seed that nobody gave is drawn.

    Raises BadRequest that names the field: `not_supported`, `missing_field`, `model_not_found` or `invalid_value`.
    """
    _refuse_unsupported(fields)
    body = _validated(fields)
    if body.model not in (None, model):
        text = f"there is no model {body.model!r} here; send {model!r}, or no model at all"
        raise BadRequest(text, code="model_not_found", param="model")
    if body.stream_options and not body.stream:
        raise BadRequest("stream_options needs stream: true", param="stream_options")
    if not isinstance(body.prompt, str) and max(body.prompt) >= vocab_size:
        text = f"token id {max(body.prompt)} is not in the vocabulary: ids are below {vocab_size}"
        raise BadRequest(text, param="prompt")
    return _wanted(body)


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    for name, harmless in UNSUPPORTED.items():
        value = fields.get(name)
        if value is not None and (isinstance(value, bool) != isinstance(harmless, bool) or value != harmless):
            text = f"{name!r} is not supported by this server: leave it out"
            raise BadRequest(text, code="not_supported", param=name)


def _validated(fields: Mapping[str, Any]) -> CompletionBody:
    given = {name: value for name, value in fields.items() if value is not None and name not in UNSUPPORTED}
    if "prompt" in given:
        given["prompt"] = _one_prompt(given["prompt"])
    try:
        return CompletionBody(**given)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0]) from None


def _one_prompt(prompt: Any) -> Any:
    """The prompt itself where it came in a list of one."""
    is_list_of_prompts = isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list))
    if is_list_of_prompts and len(prompt) > 1:
        text = f"{len(prompt)} prompts in one request are not supported: send one request for each"
        raise BadRequest(text, code="not_supported", param="prompt")
    return prompt[0] if is_list_of_prompts else prompt


def _refusal(fault: ErrorDetails) -> BadRequest:
    param = str(fault["loc"][0]) if fault["loc"] else None
    if fault["type"] == "missing":
        return BadRequest(f"a completion needs {param!r}: add it", code="missing_field", param=param)
    if fault["type"] == "extra_forbidden":
        name = ".".join(str(step) for step in fault["loc"])
        return BadRequest(f"a completion has no field {name!r}: remove it", param=param)
    if param == "prompt":
        return BadRequest("'prompt' must be a text or a list of token ids, not empty", param=param)
    return BadRequest(f"{param!r}: {fault['msg'].removeprefix('Value error, ')}", param=param)


def _wanted(body: CompletionBody) -> Wanted:
    seed = secrets.randbelow(MAX_SEED) if body.seed is None else body.seed
    return Wanted(
        prompt=body.prompt,
        max_tokens=body.max_tokens,
        sampling=SamplingParams(body.temperature, body.top_p, body.top_k, body.min_p, seed),
        stop=body.stop or (),
        ignore_eos=body.ignore_eos,
        stream=body.stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        return_token_ids=body.return_token_ids,
    )
