"""Runs one step's work through the model: tensors in, one sampled token per finished chunk out.

It knows the decoder and the arena; it does not know sessions, leases' lifetimes or the queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from chatserve.engine.sampler import sample
from chatserve.engine.scheduler import Work
from chatserve.model.attention import CpuAttention, SdpaAttention, Span
from chatserve.model.decoder import Decoder
from chatserve.model.rotated import RotatedAttention


class Step(Protocol):
    """A step that was launched."""

    @property
    def work(self) -> Sequence[Work]:
        """What it computes."""
        ...

    def tokens(self) -> list[int]:
        """The sampled tokens, one for each item of `work` that samples, in that order; waits for them."""
        ...


class Runner(Protocol):
    """The model over the arena; a step writes the KV rows of every token of its work.

    With `overlaps`, `launch` returns at once, and a request whose last token is still in flight may be launched again:
    then its input is taken from the device. `attention_name` tells the operator which kernels attend.
    """

    @property
    def overlaps(self) -> bool: ...

    @property
    def attention_name(self) -> str: ...

    def reserve(self, work: Sequence[Work]) -> None:
        """Have mapped what kernels touch beyond the leased rows; raises OutOfPages."""
        ...

    def launch(self, work: Sequence[Work]) -> Step: ...


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """See `Step`."""

    work: Sequence[Work]
    sampled: list[int]

    def tokens(self) -> list[int]:
        """See `Step.tokens`."""
        return self.sampled


class TorchRunner:
    """Computes a step when it is launched, with plain torch around an attention kind, on the decoder's device."""

    overlaps = False

    def __init__(self, decoder: Decoder, attention: CpuAttention | SdpaAttention, arena: torch.Tensor) -> None:
        self._decoder = decoder
        self._device = arena.device
        self._rotated = RotatedAttention(attention, decoder.config, dtype=arena.dtype, device=arena.device)
        self.attention_name = attention.attention_name

    def reserve(self, work: Sequence[Work]) -> None:
        """These kernels touch nothing but the rows."""

    def launch(self, work: Sequence[Work]) -> FinishedStep:
        """Compute the work in one batch."""
        input_ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        spans: list[Span] = []
        logit_rows: list[int] = []
        for item in work:
            base = item.lease.base_token
            spans.append(Span(len(input_ids), item.num_tokens, base, item.end))
            input_ids += item.request.token_ids[item.start : item.end]
            positions += range(item.start, item.end)
            rows += range(base + item.start, base + item.end)
            if item.samples:
                logit_rows.append(len(input_ids) - 1)
        step = self._rotated.plan(spans, self._tensor(rows), self._tensor(positions))
        logits = self._decoder(self._tensor(input_ids), step, self._tensor(logit_rows))
        sampling = [item for item in work if item.samples]
        if not sampling:
            return FinishedStep(work, [])
        tokens = sample(logits.cpu(), [i.request.sampling for i in sampling], [i.end for i in sampling])
        return FinishedStep(work, tokens)

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
