"""The plain, slow path: transformers' own forward, and a small driver that feeds the decoder session by session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from chatserve.model.attention import CpuAttention, NativeAttention, SdpaAttention, Span
from chatserve.model.config import model_config
from chatserve.model.decoder import Decoder
from chatserve.model.native import kernel_for
from chatserve.model.rotated import RotatedAttention
from chatserve.model.weights import load_decoder
from chatserve.pretrained import load_pretrained


def reference_logits(directory: Path, token_ids: Tensor) -> Tensor:
    """Transformers' fp32 logits [n, vocab_size] of one whole sequence [n]."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        logits: Tensor = model(token_ids[None]).logits[0]
    return logits


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-4 of the expected logits' largest magnitude."""
    assert actual.shape == expected.shape
    difference = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert difference <= 1e-4, f"relative difference {difference:.2e}"


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder under test, on the CPU."""
    pretrained = load_pretrained(str(directory))
    return load_decoder(pretrained, model_config(pretrained), dtype=dtype, device=torch.device("cpu"))


def native_attention(arena: Tensor) -> NativeAttention:
    """The C++ kind; raises where this machine has none."""
    return NativeAttention(arena, kernel_for(arena))


AnyAttention = CpuAttention | NativeAttention | SdpaAttention
KINDS: dict[str, Callable[[Tensor], AnyAttention]] = {"native": native_attention, "sdpa": SdpaAttention}


@dataclass
class Part:
    """Tokens [start, start + len(token_ids)) of the session whose token 0 lies in arena row `base_token`."""

    base_token: int
    start: int
    token_ids: Tensor


class Driver:
    """A decoder with an arena full of NaN, so that reading a row nobody wrote shows in the logits."""

    attention_for: ClassVar[Callable[[Tensor], AnyAttention]] = CpuAttention

    def __init__(self, decoder: Decoder, arena_tokens: int = 512) -> None:
        config = decoder.config
        shape = (arena_tokens, config.num_layers, 2, config.num_kv_heads, config.head_dim)
        self.arena = torch.full(shape, float("nan"), dtype=decoder.embedding.dtype)
        self._decoder = decoder
        attention = type(self).attention_for(self.arena)
        self._attention = RotatedAttention(attention, config, dtype=self.arena.dtype, device=self.arena.device)

    def step(self, parts: Sequence[Part], logit_rows: Tensor | None = None) -> Tensor:
        """Run all parts in one step; logits of every token unless `logit_rows` chooses some."""
        spans, positions, rows, start = [], [], [], 0
        for part in parts:
            length = part.token_ids.shape[0]
            spans.append(Span(start, length, part.base_token, part.start + length))
            positions.append(torch.arange(part.start, part.start + length))
            rows.append(positions[-1] + part.base_token)
            start += length
        attention = self._attention.plan(spans, torch.cat(rows), torch.cat(positions))
        chosen = torch.arange(start) if logit_rows is None else logit_rows
        input_ids = torch.cat([part.token_ids for part in parts])
        logits: Tensor = self._decoder(input_ids, attention, chosen)
        return logits
