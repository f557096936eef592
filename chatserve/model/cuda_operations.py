"""A decoder's products and norms on a GPU: our kernels where a handful of tokens meet all weights, cuBLAS elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from chatserve.model.cuda_kernels import MAX_SMALL_BATCH, embed, small_linear
from chatserve.model.flash import rmsnorm, silu_and_mul
from chatserve.model.operations import Projection

SMALL_LINEAR_CAPABILITY = 9


class CudaOperations:
    """See `Operations`. An id -1 - s stands for the token in `slot_tokens` [slots] int32 at s, unknown to the host."""

    def __init__(self, slot_tokens: Tensor) -> None:
        self._slot_tokens = slot_tokens
        is_new = torch.cuda.get_device_capability(slot_tokens.device)[0] >= SMALL_LINEAR_CAPABILITY
        self._max_small_batch = MAX_SMALL_BATCH if is_new else 0

    def embed(self, input_ids: Tensor, embedding: Tensor) -> Tensor:
        """See `Operations.embed`; `input_ids` int32."""
        return embed(input_ids, self._slot_tokens, embedding)

    def norm_project(self, rows: Tensor, norm: Tensor, eps: float, projection: Projection) -> Tensor:
        """See `Operations.norm_project`."""
        if rows.shape[0] <= self._max_small_batch:
            return small_linear(rows, projection.weight, norm=norm, eps=eps, bias=projection.bias)
        return torch.nn.functional.linear(rmsnorm(rows, norm, eps), projection.weight, projection.bias)

    def norm_gate(self, rows: Tensor, norm: Tensor, eps: float, projection: Projection) -> Tensor:
        """See `Operations.norm_gate`."""
        if rows.shape[0] <= self._max_small_batch:
            return small_linear(rows, projection.weight, norm=norm, eps=eps, bias=projection.bias, activated=True)
        gated: Tensor = silu_and_mul(self.norm_project(rows, norm, eps, projection))
        return gated

    def add_projected(self, total: Tensor, rows: Tensor, projection: Projection) -> None:
        """See `Operations.add_projected`."""
        if rows.shape[0] <= self._max_small_batch:
            small_linear(rows, projection.weight, residual=total, bias=projection.bias, out=total)
            return
        total.addmm_(rows, projection.weight.t())
        if projection.bias is not None:
            total.add_(projection.bias)

    def logits(self, rows: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
        """See `Operations.logits`."""
        if rows.shape[0] <= self._max_small_batch:
            return small_linear(rows, weight, norm=norm, eps=eps, out_dtype=torch.float32)
        return torch.mm(rmsnorm(rows, norm, eps), weight.t(), out_dtype=torch.float32)
