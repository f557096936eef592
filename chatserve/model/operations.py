"""The products and norms of a decoder layer, as a decoder asks for them, in plain torch.

`chatserve.model.cuda_operations` does the same with fused kernels. Neither knows attention.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu


class Projection(nn.Module):
    """A linear map: `weight` [out_size, in_size] with an optional `bias` [out_size]."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        parameter = partial(make_parameter, dtype=dtype, device=device)
        self.weight = parameter(out_size, in_size)
        self.bias = parameter(out_size) if bias else None


class Operations(Protocol):
    """Rows are [n, size] of the decoder's dtype; what is added to is changed in place."""

    def embed(self, input_ids: Tensor, embedding: Tensor) -> Tensor:
        """Rows of `embedding` [vocab_size, hidden_size] for `input_ids` [n]."""
        ...

    def norm_project(self, rows: Tensor, norm: Tensor, eps: float, projection: Projection) -> Tensor:
        """Project the RMS-normalised rows, scaled by `norm` [size]."""
        ...

    def norm_gate(self, rows: Tensor, norm: Tensor, eps: float, projection: Projection) -> Tensor:
        """silu(gate) * up of the normalised rows' projection, whose columns are gate, then up."""
        ...

    def add_projected(self, total: Tensor, rows: Tensor, projection: Projection) -> None:
        """Add the projected rows to `total`."""
        ...

    def logits(self, rows: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
        """Float32 logits [n, vocab_size] of the normalised rows."""
        ...


class TorchOperations:
    """`Operations` on any device."""

    def embed(self, input_ids: Tensor, embedding: Tensor) -> Tensor:
        """See `Operations.embed`."""
        return nn.functional.embedding(input_ids, embedding)

    def norm_project(self, rows: Tensor, norm: Tensor, eps: float, projection: Projection) -> Tensor:
        """See `Operations.norm_project`."""
        return linear(rms_norm(rows, (rows.shape[-1],), norm, eps), projection.weight, projection.bias)

    def norm_gate(self, rows: Tensor, norm: Tensor, eps: float, projection: Projection) -> Tensor:
        """See `Operations.norm_gate`."""
        gate, up = self.norm_project(rows, norm, eps, projection).chunk(2, dim=-1)
        return silu(gate).mul_(up)

    def add_projected(self, total: Tensor, rows: Tensor, projection: Projection) -> None:
        """See `Operations.add_projected`; the addition is part of the product."""
        total.addmm_(rows, projection.weight.t())
        if projection.bias is not None:
            total.add_(projection.bias)

    def logits(self, rows: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
        """See `Operations.logits`."""
        return linear(rms_norm(rows, (rows.shape[-1],), norm, eps), weight).float()


def make_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Memory for a weight that never needs a gradient; not filled."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
