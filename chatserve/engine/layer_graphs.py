"""Steps with prefill as CUDA graphs, except for their attention: one graph leads up to each layer's attention.

A step's kernels other than attention depend on the number of tokens only. Launched one by one they keep the host busy
for longer than a small step takes on the chip; so they are captured for a ladder of sizes, and steps are padded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chatserve.engine.cuda_inputs import StepInputs
from chatserve.model.cuda_step import CudaLayers, CudaStep
from chatserve.model.decoder import Decoder


class LayerGraphs:
    """The graphs of steps of up to `num_tokens` tokens, over the inputs `ids`, `positions` and `rows`.

    `q` and `out` [at least num_tokens, num_heads, head_dim] are where graphs and attention meet.
    """

    def __init__(
        self,
        decoder: Decoder,
        layers: CudaLayers,
        inputs: StepInputs,
        q: Tensor,
        out: Tensor,
        *,
        num_tokens: int,
        pool: Any,
    ) -> None:
        self.num_tokens = num_tokens
        self._q, self._out = q, out
        input_ids = inputs.on_device("ids", num_tokens)
        recorder = _Recorder(layers, inputs, q[:num_tokens], out[:num_tokens])
        decoder.body(input_ids, recorder)  # loads and tunes what a capture must not
        recorder.start(pool)
        self._hidden, _ = decoder.body(input_ids, recorder)
        self._graphs = recorder.graphs

    def run(self, step: CudaStep, num_tokens: int) -> tuple[Tensor, Tensor]:
        """What `Decoder.body` returns, for the step's first `num_tokens` tokens."""
        q, out = self._q[:num_tokens], self._out[:num_tokens]
        for layer, graph in enumerate(self._graphs):
            graph.replay()
            step.attend(layer, q, out)
        return self._hidden[:num_tokens], out


class _Recorder:
    """A `LayerAttention` that attends nothing: it ends one graph where attention would be, and begins the next."""

    def __init__(self, layers: CudaLayers, inputs: StepInputs, q: Tensor, out: Tensor) -> None:
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self._layers = layers
        self._positions = inputs.on_device("positions", q.shape[0])
        self._rows = inputs.on_device("rows", q.shape[0])
        self._q, self._out = q, out
        self._pool: Any = None

    def start(self, pool: Any) -> None:
        """Capture from now on."""
        self._pool = pool
        self._begin()

    def run(self, layer: int, heads: Tensor, qk_norm: Tensor | None) -> Tensor:
        """See `LayerAttention.run`."""
        self._layers.rotate_and_store(layer, heads, qk_norm, self._positions, self._rows, out=self._q)
        if self._pool is not None:
            self.graphs[-1].capture_end()
            if layer < self._layers.last:
                self._begin()
        return self._out

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self.graphs.append(graph)
