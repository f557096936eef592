"""Runs one step's work through the model: tensors in, one sampled token per finished chunk out.

It knows the decoder and the arena; it does not know sessions, leases' lifetimes or the queue.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chatserve.engine.request import Request
from chatserve.engine.sampler import sample
from chatserve.engine.scheduler import Work
from chatserve.model.attention import CpuAttention, Span
from chatserve.model.decoder import Decoder


class Runner:
    """The model over the arena. `run` writes the KV rows of every token it is given."""

    def __init__(self, decoder: Decoder, arena: torch.Tensor) -> None:
        self._decoder = decoder
        self._attention = CpuAttention(arena)

    @property
    def attention_name(self) -> str:
        """Which kernels attend, for the operator."""
        return self._attention.attention_name

    def run(self, work: Sequence[Work]) -> dict[Request, int]:
        """Compute the work in one batch; returns the next token of each request whose last token was in it."""
        input_ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        spans: list[Span] = []
        sampling: list[Request] = []
        logit_rows: list[int] = []
        for item in work:
            request, start = item.request, item.request.kv_length
            assert request.lease is not None
            end, base = start + item.num_tokens, request.lease.base_token
            spans.append(Span(len(input_ids), item.num_tokens, base, end))
            input_ids += request.token_ids[start:end]
            positions += range(start, end)
            rows += range(base + start, base + end)
            if end == len(request.token_ids):
                sampling.append(request)
                logit_rows.append(len(input_ids) - 1)
        step = self._attention.plan(spans, torch.tensor(rows))
        last_rows = torch.tensor(logit_rows, dtype=torch.int64)
        logits = self._decoder(torch.tensor(input_ids), torch.tensor(positions), step, last_rows)
        if not sampling:
            return {}
        tokens = sample(logits, [r.sampling for r in sampling], [len(r.token_ids) for r in sampling])
        return dict(zip(sampling, tokens, strict=True))
