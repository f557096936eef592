"""One decoder for the dense Llama family: norm, attention, norm, gated feed-forward, over fused weights.

Tokens of any number of sessions come as one flat batch; which of them see which is the attention step's business.
It assumes no device and no dtype, and knows neither checkpoints nor sessions.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from chatserve.model.config import ModelConfig
from chatserve.model.operations import Operations, Projection, TorchOperations, make_parameter


class LayerAttention(Protocol):
    """The attention of one step, planned for its tokens."""

    def run(self, layer: int, heads: Tensor, qk_norm: Tensor | None) -> Tensor:
        """Write the step's keys and values to the arena and attend to it: [n, num_heads, head_dim].

        `heads` [n, num_heads + 2 * num_kv_heads, head_dim] are query, key and value heads before norm and rotation;
        `qk_norm` [num_heads + num_kv_heads, head_dim] scales normalised query and key heads where a model has that.
        """
        ...


class Decoder(nn.Module):
    """The whole network. Parameters are allocated but not filled; `load_decoder` fills them."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        parameter = partial(make_parameter, dtype=dtype, device=device)
        self.config = config
        self.operations: Operations = TorchOperations()
        self.embedding = parameter(config.vocab_size, config.hidden_size)
        self._layers = [DecoderLayer(index, config, dtype=dtype, device=device) for index in range(config.num_layers)]
        self.layers = nn.ModuleList(self._layers)  # registers them; iterating the plain list is quicker and typed
        self.final_norm = parameter(config.hidden_size)
        self.lm_head = self.embedding if config.tie_embeddings else parameter(config.vocab_size, config.hidden_size)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, attention: LayerAttention, logit_rows: Tensor | None) -> Tensor:
        """Logits [r, vocab_size] float32 that follow the tokens at `logit_rows` [r]; None means all tokens.

        `input_ids` are [n] integers; `attention` was planned for these n tokens.
        """
        hidden, output = self.body(input_ids, attention)
        return self.head(hidden, output, logit_rows)

    @torch.inference_mode()
    def body(self, input_ids: Tensor, attention: LayerAttention) -> tuple[Tensor, Tensor]:
        """Everything up to the last layer's attention: `hidden` [n, hidden_size] before it, and its output."""
        operations = self.operations
        hidden = operations.embed(input_ids, self.embedding)
        for layer in self._layers[:-1]:
            layer.add_attended(hidden, layer.attend(hidden, attention, operations), operations)
            layer.feed_forward(hidden, operations)
        return hidden, self._layers[-1].attend(hidden, attention, operations)

    @torch.inference_mode()
    def head(self, hidden: Tensor, output: Tensor, logit_rows: Tensor | None) -> Tensor:
        """What follows the last attention, for the tokens at `logit_rows` only: nobody reads the others' any more."""
        if logit_rows is not None:
            hidden, output = hidden.index_select(0, logit_rows), output.index_select(0, logit_rows)
        self._layers[-1].add_attended(hidden, output, self.operations)
        self._layers[-1].feed_forward(hidden, self.operations)
        return self.operations.logits(hidden, self.final_norm, self.config.rms_norm_eps, self.lm_head)


class DecoderLayer(nn.Module):
    """One layer; both halves add to `hidden` [n, hidden_size] in place.

    `qkv` rows are all query heads, then key heads, then value heads; `gate_up` rows the gate, then the up projection.
    `qk_norm` [num_heads + num_kv_heads, head_dim] repeats the query norm, then the key norm, for each head.
    """

    def __init__(self, index: int, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        parameter = partial(make_parameter, dtype=dtype, device=device)
        projection = partial(Projection, dtype=dtype, device=device)
        hidden, inner = config.hidden_size, config.intermediate_size
        num_rotated = config.num_heads + config.num_kv_heads
        self._index = index
        self._head_dim = config.head_dim
        self._eps = config.rms_norm_eps
        self.input_norm = parameter(hidden)
        self.qkv = projection(hidden, config.q_size + 2 * config.kv_size, bias=config.qkv_bias)
        self.qk_norm = parameter(num_rotated, config.head_dim) if config.qk_norm else None
        self.o = projection(config.q_size, hidden, bias=config.o_bias)
        self.post_norm = parameter(hidden)
        self.gate_up = projection(hidden, 2 * inner, bias=config.mlp_bias)
        self.down = projection(inner, hidden, bias=config.mlp_bias)

    def attend(self, hidden: Tensor, attention: LayerAttention, operations: Operations) -> Tensor:
        """The attention's output [n, num_heads, head_dim]."""
        heads = operations.norm_project(hidden, self.input_norm, self._eps, self.qkv)
        return attention.run(self._index, heads.view(heads.shape[0], -1, self._head_dim), self.qk_norm)

    def add_attended(self, hidden: Tensor, output: Tensor, operations: Operations) -> None:
        """Add the attention's projected output to `hidden`."""
        operations.add_projected(hidden, output.flatten(1), self.o)

    def feed_forward(self, hidden: Tensor, operations: Operations) -> None:
        """Add the gated feed-forward's output to `hidden`."""
        gated = operations.norm_gate(hidden, self.post_norm, self._eps, self.gate_up)
        operations.add_projected(hidden, gated, self.down)
