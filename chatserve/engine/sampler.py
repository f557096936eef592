"""From logits to token ids. The draw of a token depends on its request's seed and its position only.

So a continuation after a crash repeats the draws it would have made, whatever shared its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from chatserve.engine.api import SamplingParams


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Choose one token a row. logits: [rows, vocab]; positions: the absolute position each new token will have."""
    tokens = torch.argmax(logits, dim=-1)
    drawn = [row for row, row_params in enumerate(params) if row_params.temperature > 0]
    if drawn:
        chosen = _draw(logits[drawn].float(), [params[row] for row in drawn], [positions[row] for row in drawn])
        tokens[drawn] = chosen
    return list(tokens.tolist())


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) fixed by seed and position: Philox, a counter-based generator (Salmon et al., SC 2011)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _draw(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> torch.Tensor:
    temperature = torch.tensor([[p.temperature] for p in params])
    probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
    kept = probabilities * _allowed(probabilities, params)
    cumulative = kept.double().cumsum(dim=-1)
    uniforms = [[uniform(p.seed, position)] for p, position in zip(params, positions, strict=True)]
    targets = torch.tensor(uniforms, dtype=torch.float64) * cumulative[:, -1:]
    picks = torch.searchsorted(cumulative, targets, right=True)
    return order.gather(1, picks.clamp_max(kept.count_nonzero(dim=-1).unsqueeze(1) - 1)).squeeze(1)


def _allowed(probabilities: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Which of the descending probabilities [rows, vocab] top-k, top-p and min-p leave; the first always stays."""
    vocab = probabilities.shape[-1]
    top_k = torch.tensor([[p.top_k or vocab] for p in params])
    top_p = torch.tensor([[p.top_p] for p in params])
    min_p = torch.tensor([[p.min_p] for p in params])
    before = probabilities.cumsum(dim=-1) - probabilities
    allowed = (torch.arange(vocab) < top_k) & (before < top_p) & (probabilities >= min_p * probabilities[:, :1])
    allowed[:, 0] = True
    return allowed
