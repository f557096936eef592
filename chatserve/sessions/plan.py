"""What a running response is: everything needed to make it, and after a restart to go on with it.

Stored in the session while the response runs. The parameters come from the command, else the session, else the limits.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chatserve.engine.api import GenerationRequest, SamplingParams
from chatserve.errors import BadRequest
from chatserve.protocol.commands import ResponseCreate, given_params
from chatserve.sessions.limits import SessionLimits

MAX_SEED = 1 << 32


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """One response. `seq` is the place of its `response.created` in the log.

    The prompt has `num_prompt` tokens, the first `num_history` of which an earlier turn computed; `miss_reason` says
    why there are not more. `fills_window`: `max_output_tokens` is what the context leaves, less than was asked for.
    """

    response_id: str
    message_id: str
    parent_id: str
    model: str
    seq: int
    created_at: int
    num_prompt: int
    num_history: int
    miss_reason: str | None
    max_output_tokens: int
    fills_window: bool
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: tuple[str, ...]
    ignore_eos: bool

    def as_map(self) -> dict[str, Any]:
        """Plain values for storing."""
        return {**{name: getattr(self, name) for name in self.__slots__}, "stop": list(self.stop)}

    @classmethod
    def from_map(cls, stored: Mapping[str, Any]) -> TurnPlan:
        """The plan stored as `as_map` gives it."""
        return cls(**{**stored, "stop": tuple(stored["stop"])})

    def request(
        self,
        session_id: str,
        tenant: str,
        token_ids: list[int],
        *,
        num_generated: int,
        num_known: int,
        eos_token_ids: tuple[int, ...],
    ) -> GenerationRequest:
        """The engine's work: `token_ids` are the prompt and the `num_generated` tokens that stand already.

        `num_known` of them the engine has seen in this session.
        """
        return GenerationRequest(
            request_id=self.response_id,
            session_id=session_id,
            tenant=tenant,
            token_ids=token_ids,
            num_history=num_known,
            max_output_tokens=self.max_output_tokens,
            sampling=SamplingParams(self.temperature, self.top_p, self.top_k, self.min_p, self.seed),
            stop_token_ids=() if self.ignore_eos else eos_token_ids,
            num_generated=num_generated,
            num_computed=self.num_history,
        )


@dataclass(frozen=True, slots=True)
class TurnParams:
    """The sampling settings of one turn, all decided."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_output_tokens: int
    seed: int
    stop: tuple[str, ...]
    ignore_eos: bool

    def as_map(self) -> dict[str, Any]:
        """The settings by name."""
        return {name: getattr(self, name) for name in self.__slots__}


def turn_params(command: ResponseCreate, session_params: Mapping[str, Any], limits: SessionLimits) -> TurnParams:
    """The command's settings over the session's over the server's. A seed that nobody gave is drawn."""
    given = {**session_params, **given_params(command)}
    return TurnParams(
        temperature=given.get("temperature", limits.temperature),
        top_p=given.get("top_p", limits.top_p),
        top_k=given.get("top_k", limits.top_k),
        min_p=given.get("min_p", limits.min_p),
        max_output_tokens=given.get("max_output_tokens", limits.max_output_tokens),
        seed=given.get("seed", secrets.randbelow(MAX_SEED)),
        stop=tuple(given.get("stop", ())),
        ignore_eos=given.get("ignore_eos", False),
    )


def output_room(num_prompt: int, max_context: int) -> int:
    """Tokens left for the reply. Raises BadRequest where the prompt leaves none."""
    if num_prompt < max_context:
        return max_context - num_prompt
    raise BadRequest(
        f"the prompt has {num_prompt} tokens and the reply needs at least one, but the context holds {max_context}: "
        "shorten the input, fork the session at an earlier message, or start a new session",
        code="context_length_exceeded",
        param="input",
    )
