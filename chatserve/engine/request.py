"""One unit of engine work and its state between steps. Little is stored; the rest is derived."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from chatserve.engine.api import FinishReason, SamplingParams
from chatserve.engine.history import TokenIds
from kvstore import Lease
from kvstore.arrays import TokenArray
from kvstore.promotion import Promotion
from kvstore.results import Missing


@dataclass(slots=True, eq=False)
class Request:
    """A session's token ids that need KV rows and then a continuation.

    `token_ids` grows by the tokens generated; `num_prompt` of them were given. The last one never has a KV row until
    the step after it was sampled. `max_tokens` is the length at which the request ends, for `limit_reason`.
    `promotion` brings back a part of what tiers below have of it, until they have `has_asked_below` no more for this
    admission; `num_restored` tokens came from each, in `restored_s`, and `read_failure` says why some did not come.
    The first `num_computed` were computed before; where not all of them were found, `missing` says where the rest is.
    Steps in flight run ahead of what is known: `num_scheduled` tokens have rows or will have, `num_unknown` were
    sampled on the device and have not arrived. `slot` is the place of the last one of them there.
    """

    request_id: str
    session_id: str
    salt: bytes
    token_ids: TokenIds
    num_prompt: int
    max_tokens: int
    limit_reason: FinishReason
    sampling: SamplingParams
    stop_token_ids: frozenset[int]
    reuse: bool
    num_computed: int
    history_known: bool
    arrived_s: float
    lease: Lease | None = None
    slot: int = 0
    num_scheduled: int = 0
    num_unknown: int = 0
    cancelled: bool = False
    admitted_s: float | None = None
    started_s: float | None = None
    num_cached_tokens: int = 0
    promotion: Promotion | None = None
    has_asked_below: bool = False
    num_mapped_ahead: int = 0
    num_restored: dict[str, int] = field(default_factory=dict)
    restored_s: float = 0.0
    read_failure: str | None = None
    missing: Missing | None = None
    leader: Request | None = field(default=None, repr=False)
    leader_tokens: int = 0
    given: TokenArray = field(init=False, repr=False)  # the ids it came with, to compare with others'

    def __post_init__(self) -> None:
        self.given = self.tokens()

    def tokens(self) -> TokenArray:
        """A copy of `token_ids`."""
        return np.array(self.token_ids, np.int32)

    @property
    def num_missing(self) -> int:
        """Tokens computed before whose rows were not found; the last one sampled then never had one."""
        return self.num_computed - 1 - self.num_cached_tokens

    @property
    def kv_length(self) -> int:
        """Tokens whose KV rows are written."""
        return self.lease.kv_length if self.lease else 0

    @property
    def num_expected(self) -> int:
        """Tokens of the request once what is in flight has arrived."""
        return len(self.token_ids) + self.num_unknown

    @property
    def num_pending(self) -> int:
        """Tokens that no step has been given yet: 1 while decoding, 0 when the tokens in flight are the last ones."""
        num_expected = self.num_expected
        if self.cancelled:
            return 0
        if self.num_unknown and num_expected >= self.max_tokens:
            return 0
        return num_expected - self.num_scheduled

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request is over after its last token, or None while it goes on."""
        if len(self.token_ids) > self.num_prompt and self.token_ids[-1] in self.stop_token_ids:
            return "stop"
        if len(self.token_ids) >= self.max_tokens:
            return self.limit_reason
        return None
