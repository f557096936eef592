"""Steps on a GPU, launched without waiting: decodes as CUDA graphs, prefills kernel by kernel, tokens kept on the chip.

The host is one step ahead. It plans and launches step n + 1 while step n runs, and waits only for a step's tokens.
It does not know sessions or the queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chatserve.engine.cuda_inputs import CAPTURED_SIZES, StepInputs, graph_batches, padded, step_sizes
from chatserve.engine.cuda_sampler import draw
from chatserve.engine.layer_graphs import LayerGraphs
from chatserve.engine.scheduler import Work
from chatserve.model.attention import Span
from chatserve.model.cuda_kernels import argmax, expand_indices
from chatserve.model.cuda_operations import CudaOperations
from chatserve.model.cuda_step import CudaLayers, CudaStep, TokenCounts
from chatserve.model.decoder import Decoder
from chatserve.model.flash import DecodeKernel, FlashKernels
from chatserve.model.spans import (
    BLOCK_TOKENS,
    TILE_TOKENS,
    DecodePlan,
    block_counts,
    count_tiles,
    decode_plan,
    prefers_ragged,
)
from kvstore import Lease

NOT_STORED = -1


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's work by the kernel that attends it."""

    decodes: list[Work]
    paged: list[Work]
    ragged: list[Work]

    @property
    def ordered(self) -> list[Work]:
        """All of it, in the order of the step's tokens."""
        return self.decodes + self.paged + self.ragged


@dataclass(frozen=True, slots=True)
class DecodeGraph:
    """A captured step of `batch_size` decodes; `logits` [batch_size, vocab_size] are what a replay leaves there."""

    batch_size: int
    kernel: DecodeKernel
    graph: torch.cuda.CUDAGraph
    logits: Tensor


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """See `chatserve.engine.runner.Step`."""

    work: list[Work]
    rows: list[int]
    host_tokens: Tensor
    arrived: torch.cuda.Event

    def tokens(self) -> list[int]:
        """See `Step.tokens`."""
        self.arrived.synchronize()
        tokens = self.host_tokens.tolist()
        return [tokens[row] for row in self.rows]


class CudaRunner:
    """`Runner` for a decoder and an arena on the current CUDA device and stream.

    `warm_lease` lends rows while graphs are captured; at most `max_running` requests and `max_step_tokens` tokens
    make a step.
    """

    overlaps = True

    def __init__(
        self,
        decoder: Decoder,
        arena: Tensor,
        warm_lease: Lease,
        *,
        max_step_tokens: int,
        max_running: int,
        max_context: int,
    ) -> None:
        device, config = arena.device, decoder.config
        self._batches = graph_batches(max_running)
        self._sizes = step_sizes(max_step_tokens)
        max_rows = self._batches[-1]
        self._decoder = decoder
        self._num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._flash = FlashKernels(arena, config.num_heads)
        self._layers = CudaLayers(config, arena)
        self._spare_slot = max_running
        self._slot_tokens = torch.zeros(max_running + 1, dtype=torch.int32, device=device)
        decoder.operations = CudaOperations(self._slot_tokens)
        per_token = dict.fromkeys(("ids", "positions", "rows"), max(max_step_tokens, max_rows))
        per_request = dict.fromkeys(("logit_rows", "slots", "bases", "indptr"), max_rows + 1)
        self._inputs = StepInputs(per_token | per_request, device)
        max_blocks = (max_rows + 1) * (-(-max_context // BLOCK_TOKENS) + 1)
        self._block_indices = torch.zeros(max_blocks, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._host_tokens = [torch.zeros(max_rows, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        self._decode = DecodeKernel(self._flash, self._block_indices)
        self._copied = torch.cuda.Event()
        self._warm_prefill(warm_lease)
        self._graphs = self._capture_all(self._batches, warm_lease.base_token)
        self._layer_graphs = self._capture_layers([size for size in self._sizes if size <= CAPTURED_SIZES[-1]])

    @property
    def attention_name(self) -> str:
        """See `Runner.attention_name`."""
        return self._flash.name

    def reserve(self, work: Sequence[Work]) -> None:
        """Have mapped what the kernel that reads whole tiles reads beyond the rows."""
        for item in self._arrange(work).ragged:
            item.lease.guard(item.end)

    def launch(self, work: Sequence[Work]) -> StepInFlight:
        """Queue the step and the copy of its tokens to the host."""
        self._copied.synchronize()  # the last step's inputs have left the host; true long since, hence no wait
        batch = self._arrange(work)
        sampling = [item for item in batch.ordered if item.samples]
        if batch.paged or batch.ragged:
            rows = list(range(len(sampling)))
            logits = self._run_with_prefill(batch, sampling)
        else:
            rows = [row for row, item in enumerate(batch.decodes) if item.samples]
            logits = self._replay(batch.decodes)
        if logits is not None:
            self._draw(sampling, rows, logits)
        for item in batch.ragged:
            item.lease.unguard()  # once the step has run; then no growth has to wait for it
        return self._fetch(batch.ordered, rows)

    def _arrange(self, work: Sequence[Work]) -> Batch:
        decodes = [item for item in work if item.num_tokens == 1]
        prefills = [item for item in work if item.num_tokens > 1]
        num_tiles = sum(count_tiles(item.num_tokens, self._flash.shape.num_heads) for item in prefills)
        ragged = [item for item in prefills if self._is_ragged(item, num_tiles)]
        paged = [item for item in prefills if not self._is_ragged(item, num_tiles)]
        return Batch(decodes, paged, sorted(ragged, key=lambda item: item.lease.base_token))

    def _is_ragged(self, item: Work, num_tiles: int) -> bool:
        return self._flash.has_fa3 and prefers_ragged(
            item.num_tokens, item.start, num_tiles=num_tiles, num_processors=self._num_processors
        )

    def _replay(self, decodes: list[Work]) -> Tensor:
        """One query a session, as a graph; the batch is padded with queries that look at one row and store none."""
        graph = next(graph for graph in self._graphs if graph.batch_size >= len(decodes))
        self._put_tokens(decodes, padded_to=graph.batch_size)
        self._put_slots(decodes, padded_to=graph.batch_size)
        self._plan_decodes(graph.kernel, decodes, graph.batch_size)
        self._copied.record()
        graph.graph.replay()
        return graph.logits

    def _run_with_prefill(self, batch: Batch, sampling: list[Work]) -> Tensor | None:
        """A step with prefill; the logits of the items that sample, if any do."""
        ordered = batch.ordered
        ends = np.cumsum([item.num_tokens for item in ordered])
        num_tokens = int(ends[-1])
        graphs = next((graphs for graphs in self._layer_graphs if graphs.num_tokens >= num_tokens), None)
        counts = TokenCounts(len(batch.decodes), *(sum(i.num_tokens for i in g) for g in (batch.paged, batch.ragged)))
        num_padded, num_rows = padded(num_tokens, self._sizes), padded(len(sampling), [0, *self._batches])
        last_rows = [int(end) - 1 for item, end in zip(ordered, ends, strict=True) if item.samples]
        self._put_tokens(ordered, padded_to=num_padded)
        self._put_slots(sampling, padded_to=num_rows)
        self._inputs.put("logit_rows", last_rows, padded_to=num_rows)
        self._plan_decodes(self._decode, batch.decodes, len(batch.decodes))
        self._plan_prefills(batch)
        self._copied.record()
        step = self._step(self._decode, counts, num_padded)
        hidden, output = graphs.run(step, num_tokens) if graphs else self._run_kernels(step, num_padded)
        if not sampling:
            return None
        logits = self._decoder.head(hidden, output, self._inputs.on_device("logit_rows", num_rows))
        self._choose_greedily(logits)
        return logits

    def _run_kernels(self, step: CudaStep, num_tokens: int) -> tuple[Tensor, Tensor]:
        """A large step: every launch is made from here, hidden behind the work of the chip."""
        return self._decoder.body(self._inputs.on_device("ids", num_tokens), step)

    def _step(self, kernel: DecodeKernel, counts: TokenCounts, num_tokens: int) -> CudaStep:
        places = (self._inputs.on_device(name, num_tokens) for name in ("positions", "rows"))
        return CudaStep(self._layers, self._flash, kernel, counts, *places)

    def _put_tokens(self, ordered: list[Work], padded_to: int = 0) -> None:
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for item in ordered:
            base = item.lease.base_token
            ids += _input_ids(item)
            positions += range(item.start, item.end)
            rows += range(base + item.start, base + item.end)
        self._inputs.put("ids", ids, padded_to=padded_to)
        self._inputs.put("positions", positions, padded_to=padded_to)
        self._inputs.put("rows", rows, padded_to=padded_to, pad=NOT_STORED)

    def _put_slots(self, sampling: list[Work], padded_to: int = 0) -> None:
        self._inputs.put("slots", [item.request.slot for item in sampling], padded_to=padded_to, pad=self._spare_slot)

    def _plan_decodes(self, kernel: DecodeKernel, decodes: list[Work], batch_size: int) -> None:
        """Send the step's inputs and plan its decodes; padding looks at the first session's first row."""
        bases = [item.lease.base_token // BLOCK_TOKENS for item in decodes]
        lengths = np.ones(batch_size, np.int32)
        lengths[: len(decodes)] = [item.end for item in decodes]
        self._plan_blocks(kernel, bases, decode_plan(lengths))

    def _plan_blocks(self, kernel: DecodeKernel, bases: list[int], plan: DecodePlan) -> None:
        batch_size = len(plan.lengths)
        self._inputs.put("bases", bases, padded_to=batch_size, pad=bases[0] if bases else 0)
        self._inputs.put("indptr", plan.indptr.numpy())
        self._inputs.send()
        if not batch_size:
            return
        on_device = self._inputs.on_device
        expand_indices(on_device("bases", batch_size), on_device("indptr", batch_size + 1), self._block_indices)
        kernel.plan(plan)

    def _plan_prefills(self, batch: Batch) -> None:
        if batch.paged:
            spans = _spans(batch.paged)
            self._flash.plan_paged(spans, _blocks(spans).to(self._block_indices.device, non_blocking=True))
        if batch.ragged:
            self._flash.plan_ragged(_spans(batch.ragged))

    def _choose_greedily(self, logits: Tensor) -> None:
        argmax(logits, self._inputs.on_device("slots", logits.shape[0]), self._slot_tokens, self._tokens)

    def _draw(self, sampling: list[Work], rows: list[int], logits: Tensor) -> None:
        """Replace the greedy choice of requests with a temperature; the others pay nothing."""
        drawn = [index for index, item in enumerate(sampling) if item.request.sampling.temperature > 0]
        if not drawn:
            return
        device, items = logits.device, [sampling[index] for index in drawn]
        chosen = torch.tensor([rows[index] for index in drawn], device=device)
        slots = torch.tensor([item.request.slot for item in items], device=device)
        tokens = draw(logits[chosen], [item.request.sampling for item in items], [item.end for item in items])
        self._tokens[chosen] = tokens
        self._slot_tokens[slots] = tokens

    def _fetch(self, ordered: list[Work], rows: list[int]) -> StepInFlight:
        self._host_tokens.reverse()  # the other one may still hold the tokens of the step before
        host_tokens, arrived = self._host_tokens[0], torch.cuda.Event()
        host_tokens.copy_(self._tokens, non_blocking=True)
        arrived.record()
        return StepInFlight(ordered, rows, host_tokens, arrived)

    def _warm_prefill(self, lease: Lease) -> None:
        """Load and tune every kernel of a large step before someone waits for it; nothing is stored."""
        length, base = lease.capacity_tokens, lease.base_token
        for num_tokens in sorted({self._sizes[-1], *(size for size in self._sizes if size > CAPTURED_SIZES[-1])}):
            spans = [Span(at, min(length, num_tokens - at), base, length) for at in range(0, num_tokens, length)]
            self._flash.plan_paged(spans, _blocks(spans).to(self._block_indices.device))
            self._warm(TokenCounts(0, paged=num_tokens))
        if self._flash.has_fa3 and length >= TILE_TOKENS:
            self._flash.plan_ragged([Span(0, TILE_TOKENS, base, TILE_TOKENS)])
            self._warm(TokenCounts(0, ragged=TILE_TOKENS))

    def _warm(self, counts: TokenCounts) -> None:
        num_tokens = counts.paged + counts.ragged
        self._inputs.put("rows", [], padded_to=num_tokens, pad=NOT_STORED)
        self._inputs.send()
        step = self._step(self._decode, counts, num_tokens)
        self._decoder(self._inputs.on_device("ids", num_tokens), step, self._inputs.on_device("logit_rows", 1))
        torch.cuda.current_stream().synchronize()

    def _capture_all(self, batches: Sequence[int], base_token: int) -> list[DecodeGraph]:
        """Largest first, so that the smaller ones fit into the memory that it took."""
        pool = torch.cuda.graph_pool_handle()
        graphs = [self._capture(batch_size, base_token, pool) for batch_size in reversed(batches)]
        torch.cuda.synchronize()
        return graphs[::-1]

    def _capture_layers(self, sizes: Sequence[int]) -> list[LayerGraphs]:
        if not sizes:
            return []
        shape = self._flash.shape
        q, out = torch.zeros(
            2, sizes[-1], shape.num_heads, shape.head_dim, dtype=self._flash.dtype, device=self._tokens.device
        )
        self._inputs.put("rows", [], padded_to=sizes[-1], pad=NOT_STORED)
        self._inputs.send()
        pool = torch.cuda.graph_pool_handle()
        graphs = [
            LayerGraphs(self._decoder, self._layers, self._inputs, q, out, num_tokens=size, pool=pool)
            for size in reversed(sizes)
        ]
        torch.cuda.current_stream().synchronize()
        return graphs[::-1]

    def _capture(self, batch_size: int, base_token: int, pool: Any) -> DecodeGraph:
        kernel = DecodeKernel(self._flash, self._block_indices, graph_batch=batch_size)
        self._copied.synchronize()
        self._inputs.put("rows", [], padded_to=batch_size, pad=NOT_STORED)
        self._inputs.put("slots", [], padded_to=batch_size, pad=self._spare_slot)
        self._plan_blocks(kernel, [base_token // BLOCK_TOKENS], decode_plan(np.ones(batch_size, np.int32)))
        self._copied.record()
        self._run_decodes(kernel, batch_size)  # loads and tunes what a capture must not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            logits = self._run_decodes(kernel, batch_size)
        return DecodeGraph(batch_size, kernel, graph, logits)

    def _run_decodes(self, kernel: DecodeKernel, batch_size: int) -> Tensor:
        step = self._step(kernel, TokenCounts(batch_size), batch_size)
        logits: Tensor = self._decoder(self._inputs.on_device("ids", batch_size), step, None)
        self._choose_greedily(logits)
        return logits


def _input_ids(item: Work) -> Sequence[int]:
    """The chunk's ids; a token that is still on the chip is named by its slot, see `CudaOperations`."""
    ids = item.request.token_ids[item.start : item.end]
    return ids if len(ids) == item.num_tokens else [*ids, -1 - item.request.slot]


def _spans(items: Sequence[Work]) -> list[Span]:
    starts = np.cumsum([0, *(item.num_tokens for item in items)])
    return [
        Span(int(start), item.num_tokens, item.lease.base_token, item.end)
        for start, item in zip(starts, items, strict=False)
    ]


def _blocks(spans: Sequence[Span]) -> Tensor:
    """The blocks of all spans, counting up from each one's base, int32."""
    counts = block_counts([span.kv_length for span in spans])
    firsts = [span.base_token // BLOCK_TOKENS for span in spans]
    return torch.cat([torch.arange(f, f + c, dtype=torch.int32) for f, c in zip(firsts, counts, strict=True)])
