"""One decoder for the dense Llama family: norm, attention, norm, gated feed-forward, over fused weights.

Tokens of any number of sessions come as one flat batch; which of them see which is the attention step's business.
It assumes no device and no dtype, and knows neither checkpoints nor sessions.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, rms_norm, silu

from chatserve.model.attention import AttentionStep
from chatserve.model.config import ModelConfig
from chatserve.model.rope import rope_table, rotate, select_positions


class Decoder(nn.Module):
    """The whole network. Parameters are allocated but not filled; `load_decoder` fills them."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        parameter = partial(_parameter, dtype=dtype, device=device)
        self.config = config
        self.embedding = parameter(config.vocab_size, config.hidden_size)
        self._layers = [DecoderLayer(index, config, dtype=dtype, device=device) for index in range(config.num_layers)]
        self.layers = nn.ModuleList(self._layers)  # registers them; iterating the plain list is quicker and typed
        self.final_norm = parameter(config.hidden_size)
        self.lm_head = self.embedding if config.tie_embeddings else parameter(config.vocab_size, config.hidden_size)
        self.rope: Tensor
        self.register_buffer("rope", rope_table(config, dtype=dtype, device=device), persistent=False)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, positions: Tensor, attention: AttentionStep, logit_rows: Tensor) -> Tensor:
        """Logits [r, vocab_size] float32 that follow the tokens at `logit_rows` [r].

        `input_ids` and `positions` are [n] int64; `attention` was planned for these n tokens.
        """
        hidden = embedding(input_ids, self.embedding)
        cos, sin = select_positions(self.rope, positions)
        last = self.config.num_layers - 1
        for index, layer in enumerate(self._layers):
            layer.attend(hidden, cos, sin, attention)
            if index == last:  # nothing reads the other tokens' output once their keys and values are written
                hidden = hidden.index_select(0, logit_rows)
            layer.feed_forward(hidden)
        hidden = rms_norm(hidden, (hidden.shape[-1],), self.final_norm, self.config.rms_norm_eps)
        return linear(hidden, self.lm_head).float()


class DecoderLayer(nn.Module):
    """One layer; both halves add to `hidden` [n, hidden_size] in place.

    `qkv` rows are all query heads, then key heads, then value heads; `gate_up` rows the gate, then the up projection.
    `qk_norm` [num_heads + num_kv_heads, head_dim] repeats the query norm, then the key norm, for each head.
    """

    def __init__(self, index: int, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        parameter = partial(_parameter, dtype=dtype, device=device)
        projection = partial(Projection, dtype=dtype, device=device)
        hidden, inner = config.hidden_size, config.intermediate_size
        self._index = index
        self._num_heads = config.num_heads
        self._num_rotated = config.num_heads + config.num_kv_heads
        self._head_dim = config.head_dim
        self._eps = config.rms_norm_eps
        self.input_norm = parameter(hidden)
        self.qkv = projection(hidden, config.q_size + 2 * config.kv_size, bias=config.qkv_bias)
        self.qk_norm = parameter(self._num_rotated, config.head_dim) if config.qk_norm else None
        self.o = projection(config.q_size, hidden, bias=config.o_bias)
        self.post_norm = parameter(hidden)
        self.gate_up = projection(hidden, 2 * inner, bias=config.mlp_bias)
        self.down = projection(inner, hidden, bias=config.mlp_bias)

    def attend(self, hidden: Tensor, cos: Tensor, sin: Tensor, attention: AttentionStep) -> None:
        """Add the attention's output to `hidden`; `cos` and `sin` are [n, 1, head_dim]."""
        normed = rms_norm(hidden, (hidden.shape[-1],), self.input_norm, self._eps)
        heads = self.qkv(normed).view(hidden.shape[0], -1, self._head_dim)
        qk, v = heads[:, : self._num_rotated], heads[:, self._num_rotated :]
        if self.qk_norm is not None:
            qk = rms_norm(qk, (self._head_dim,), None, self._eps).mul_(self.qk_norm)
        qk = rotate(qk, cos, sin)
        output = attention.run(self._index, qk[:, : self._num_heads], qk[:, self._num_heads :], v)
        self.o.add_to(hidden, output.flatten(1))

    def feed_forward(self, hidden: Tensor) -> None:
        """Add the gated feed-forward's output to `hidden`."""
        normed = rms_norm(hidden, (hidden.shape[-1],), self.post_norm, self._eps)
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        self.down.add_to(hidden, silu(gate).mul_(up))


class Projection(nn.Module):
    """A linear map [out_size, in_size] with an optional bias [out_size]."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = _parameter(out_size, in_size, dtype=dtype, device=device)
        self.bias = _parameter(out_size, dtype=dtype, device=device) if bias else None

    def forward(self, rows: Tensor) -> Tensor:
        """Map `rows` [n, in_size] to [n, out_size]."""
        return linear(rows, self.weight, self.bias)

    def add_to(self, total: Tensor, rows: Tensor) -> None:
        """Add the map of `rows` [n, in_size] to `total` [n, out_size] in place, within the multiplication itself."""
        total.addmm_(rows, self.weight.t())
        if self.bias is not None:
            total.add_(self.bias)


def _parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
