"""One unit of engine work and its state between steps. Little is stored; the rest is derived."""

from __future__ import annotations

from dataclasses import dataclass, field

from chatserve.engine.api import FinishReason, SamplingParams
from kvstore import Lease


@dataclass(slots=True, eq=False)
class Request:
    """A session's token ids that need KV rows and then a continuation.

    `token_ids` grows by the tokens generated; `num_prompt` of them were given. The last one never has a KV row until
    the step after it was sampled. `max_tokens` is the length at which the request ends, for `limit_reason`.
    """

    request_id: str
    session_id: str
    salt: bytes
    token_ids: list[int]
    num_prompt: int
    max_tokens: int
    limit_reason: FinishReason
    sampling: SamplingParams
    stop_token_ids: frozenset[int]
    reuse: bool
    num_history: int
    history_known: bool
    arrived_s: float
    lease: Lease | None = None
    cancelled: bool = False
    admitted_s: float | None = None
    started_s: float | None = None
    num_cached_tokens: int = 0
    leader: Request | None = field(default=None, repr=False)
    leader_tokens: int = 0

    @property
    def kv_length(self) -> int:
        """Tokens whose KV rows are written."""
        return self.lease.kv_length if self.lease else 0

    @property
    def num_pending(self) -> int:
        """Tokens that still need KV rows; 1 while decoding."""
        return len(self.token_ids) - self.kv_length

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request is over after its last token, or None while it goes on."""
        if len(self.token_ids) > self.num_prompt and self.token_ids[-1] in self.stop_token_ids:
            return "stop"
        if len(self.token_ids) >= self.max_tokens:
            return self.limit_reason
        return None
