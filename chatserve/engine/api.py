"""What the front end and the engine say to each other: plain dataclasses, no tensors, no I/O.

The session manager is written against `Engine`; the supervised child process and the doubles in the tests implement it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "max_output_tokens", "context_window", "cancelled"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off.

    `seed` with the absolute position of a token in its session decides the draw, so a continuation is reproducible.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0

    def as_map(self) -> dict[str, Any]:
        """The settings by name."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One unit of engine work. `token_ids` is the whole path of the session, ending in what must be answered.

    The first `num_history` of them were part of an earlier request of this session, so only a hash of them travels.
    The first `num_computed` were computed before, perhaps by another engine: of these it is told why any are missing.
    The last `num_generated` were already generated for this very response (continued after an interruption).
    `stop_token_ids` end the response; `max_output_tokens` counts from the response's start.
    """

    request_id: str
    session_id: str
    tenant: str
    token_ids: Sequence[int]
    num_history: int
    max_output_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: Sequence[int] = ()
    num_generated: int = 0
    num_computed: int = 0
    reuse: bool = True


@dataclass(frozen=True, slots=True)
class Started:
    """Prefill is done. `cached_tokens` of the input came from the tier named; times in milliseconds.

    `miss_reason`: why less was found than was computed before; None too where computing again was sooner than reading.
    """

    cached_tokens: dict[str, int]
    queue_ms: float
    restore_ms: float
    prefill_ms: float
    miss_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """Newly generated token ids, in order, including a stop token when one was sampled."""

    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Resumed:
    """The engine was replaced and goes on with this request from the tokens already reported."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The request ended; nothing follows. `decode_ms` is the time from the first generated token to the last."""

    reason: FinishReason
    decode_ms: float


@dataclass(frozen=True, slots=True)
class Held:
    """Tokens of a history by the tier that would give them (`device`, `host`, `disk`), and how long that would take."""

    tokens: dict[str, int]
    restore_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A history that is deleted: its ids, the first `num_kept` of which other sessions begin with too."""

    token_ids: Sequence[int]
    num_kept: int = 0


Progress = Started | Tokens | Resumed | Finished


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine found when it started. `max_context` bounds prompt and reply of one session, in tokens.

    Histories that leave the device go to `host_bytes` of host memory and from there to `disk_bytes` of disk, 0 for
    none. `max_running` requests run at a time.
    """

    model: str
    max_context: int
    vocab_size: int
    capacity_tokens: int
    page_bytes: int
    token_bytes: int
    device: str
    dtype: str
    attention: str
    host_bytes: int = 0
    disk_bytes: int = 0
    max_running: int = 64

    @property
    def has_tiers(self) -> bool:
        """Whether a history that leaves the device goes anywhere."""
        return self.host_bytes > 0


class Engine(Protocol):
    """The engine as the session manager sees it."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def ready(self) -> bool: ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[Progress]:
        """Run one request: `Started`, then `Tokens` and perhaps `Resumed` in any order, then one `Finished`.

        Raises `chatserve.errors.BadRequest` (`context_length_exceeded`), `Overloaded` (`queue_full`) or
        `Unavailable` (`server_interrupted`: the engine died twice under this request).
        Closing the iterator early cancels the request.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Ask for the request's end at the next step; its iterator then yields `Finished("cancelled")`."""
        ...

    def forget_session(self, session_id: str) -> None:
        """Drop the session's tensor and token ids; its shared pages stay indexed until they are evicted."""
        ...

    async def delete_session(self, session_id: str, tenant: str, histories: Sequence[Forgotten]) -> None:
        """As `forget_session`, and from every tier what of these histories nobody else needs.

        Returns when it is gone, also from disk; where that takes long, or no engine is there, before: it is told when
        it is back.
        """
        ...

    def warm_session(self, session_id: str, tenant: str, token_ids: Sequence[int]) -> None:
        """A turn on this history is likely: what tiers below the device have of it is brought back meanwhile."""
        ...

    async def stats(self) -> dict[str, Any]:
        """The KV store's accounts, see `kvstore.KVStats`. Raises Unavailable without an engine."""
        ...

    async def cached_tokens(self, session_id: str, tenant: str, token_ids: Sequence[int]) -> Held:
        """How much of a history is held now, and where."""
        ...
