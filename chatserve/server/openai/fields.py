"""What the bodies of this surface have in common: settings of a generation, and refusals that name the field.

A body is read in two steps: first every field is refused that asks for what this server does not have, then the rest is
validated strictly, so that nothing that was asked for is ever left out in silence.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from chatserve.engine.api import SamplingParams
from chatserve.errors import BadRequest
from chatserve.protocol.commands import MinP, Seed, Stop, Temperature, TopP

MAX_SEED = 1 << 32
AS_MANY_AS_FIT = 1 << 20  # more tokens than any context holds

Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
MaxTokens = Annotated[int, Field(strict=True, ge=1, le=AS_MANY_AS_FIT)]
Harmless = Mapping[str, tuple[Any, ...]]  # names of fields, and the values besides null that ask for nothing
FieldsT = TypeVar("FieldsT", bound="Fields")


def _no_stop(value: object) -> object:
    return value or None


def _unbounded_top_k(value: object) -> object:
    """vLLM writes "off" as -1, too."""
    return 0 if value == -1 and not isinstance(value, bool) else value


class Fields(BaseModel):
    """Named fields and no others. `hints` say what one must be where the validator's words would not."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    hints: ClassVar[Mapping[str, str]] = {}


class Body(Fields):
    """Fields of every kind of request. `user` is taken and not used."""

    model: Text | None = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Annotated[int, BeforeValidator(_unbounded_top_k), Field(strict=True, ge=0, lt=1 << 31)] = 0
    min_p: MinP = 0.0
    seed: Seed | None = None
    stop: Annotated[Stop | None, BeforeValidator(_no_stop)] = None
    stream: Flag = False
    ignore_eos: Flag = False
    user: Text | None = None


class StreamOptions(Fields):
    """What a stream carries besides text."""

    include_usage: Flag = False
    include_obfuscation: Flag = False


class CompletionFields(Body):
    """Fields of both kinds of completions."""

    stream_options: StreamOptions | None = None
    return_token_ids: Flag = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """A generation, all decided: how long, how to sample, and what the answer carries."""

    max_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    ignore_eos: bool
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False


def refuse_unsupported(fields: Mapping[str, Any], harmless: Harmless, place: str = "") -> None:
    """Raise BadRequest (`not_supported`) for the first field whose value asks for something."""
    for name, values in harmless.items():
        value = fields.get(name)
        if value is not None and not any(_is_same(value, known) for known in values):
            raise not_supported(place + name, "leave it out")


def not_supported(param: str, remedy: str) -> BadRequest:
    """The refusal of something that OpenAI has and this server has not."""
    return BadRequest(f"{param!r} is not supported by this server: {remedy}", code="not_supported", param=param)


def validated(body: type[FieldsT], fields: Mapping[str, Any], harmless: Harmless, *, what: str) -> FieldsT:
    """The fields without those in `harmless`. Raises BadRequest that names the field; `what` needs it."""
    given = {name: value for name, value in fields.items() if value is not None and name not in harmless}
    try:
        return body(**given)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0], what, body.hints) from None


def check_model(body: Body, model: str) -> None:
    """Raise BadRequest where the body names another model than is served."""
    if body.model not in (None, model):
        text = f"there is no model {body.model!r} here; send {model!r}, or no model at all"
        raise BadRequest(text, code="model_not_found", param="model")


def check_stream_options(body: CompletionFields) -> None:
    """Raise BadRequest for options of a stream that is none, or that there are not."""
    if body.stream_options and not body.stream:
        raise BadRequest("stream_options needs stream: true", param="stream_options")
    if body.stream_options and body.stream_options.include_obfuscation:
        raise not_supported("stream_options.include_obfuscation", "leave it out")


def sampling_of(body: Body) -> SamplingParams:
    """How to sample; a seed that nobody gave is drawn."""
    seed = secrets.randbelow(MAX_SEED) if body.seed is None else body.seed
    return SamplingParams(body.temperature, body.top_p, body.top_k, body.min_p, seed)


def wanted_of(body: CompletionFields, max_tokens: int) -> Wanted:
    """What a completion's body asks for besides its prompt."""
    return Wanted(
        max_tokens=max_tokens,
        sampling=sampling_of(body),
        stop=body.stop or (),
        ignore_eos=body.ignore_eos,
        stream=body.stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        return_token_ids=body.return_token_ids,
    )


def _is_same(value: Any, known: Any) -> bool:
    """Equality in JSON's eyes: true is not 1."""
    return isinstance(value, bool) == isinstance(known, bool) and bool(value == known)


def _refusal(fault: ErrorDetails, what: str, hints: Mapping[str, str]) -> BadRequest:
    param = str(fault["loc"][0]) if fault["loc"] else ""
    if fault["type"] == "missing":
        return BadRequest(f"{what} needs {param!r}: add it", code="missing_field", param=param)
    if fault["type"] == "extra_forbidden":
        name = ".".join(str(step) for step in fault["loc"])
        return BadRequest(f"{what} has no field {name!r}: remove it", param=param)
    return BadRequest(f"{param!r}: {hints.get(param, fault['msg'].removeprefix('Value error, '))}", param=param)
