"""Drawing tokens on the GPU by the same rule as `chatserve.engine.sampler`: seed and position decide the draw.

Candidates are not sorted: flashinfer finds the cut-offs, and the draw inverts the distribution in vocabulary order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chatserve.engine.api import SamplingParams
from chatserve.engine.sampler import uniform
from chatserve.model.flash import top_k_renorm_probs, top_p_renorm_probs


def draw(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """One token a row, int32 [rows], of float32 logits [rows, vocab]; every temperature is above 0."""
    device = logits.device
    temperature = torch.tensor([[p.temperature] for p in params], device=device)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    cumulative = _kept(probabilities, params).double().cumsum(dim=-1)
    uniforms = [[uniform(p.seed, position)] for p, position in zip(params, positions, strict=True)]
    targets = torch.tensor(uniforms, dtype=torch.float64, device=device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).clamp_max(logits.shape[-1] - 1).squeeze(1).int()


def _kept(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The probabilities [rows, vocab] that top-k, top-p and min-p leave, zero elsewhere."""
    device, kept = probabilities.device, probabilities
    if any(p.top_k for p in params):
        top_k = torch.tensor([p.top_k or probabilities.shape[-1] for p in params], dtype=torch.int32, device=device)
        kept = kept * (top_k_renorm_probs(probabilities, top_k) > 0)
    if any(p.top_p < 1 for p in params):
        top_p = torch.tensor([p.top_p for p in params], device=device)
        kept = kept * (top_p_renorm_probs(probabilities, top_p) > 0)
    if any(p.min_p for p in params):
        floor = torch.tensor([[p.min_p] for p in params], device=device) * probabilities.amax(dim=-1, keepdim=True)
        kept = kept * (probabilities >= floor)
    return kept
