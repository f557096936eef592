"""Attention on virtual tensors beside FlashInfer's own paged kernels, at Llama-3-8B's shape, in one run.

Ours read sessions at contiguous addresses of a token-major arena (a page holds all layers of 16 tokens), the others
read a pool of 16-token pages a layer through a random table. Needs a GPU with about 90 GiB free and flashinfer.
Prints microseconds a layer, the rate, and the ratio; `--json FILE` writes the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor

from chatserve.model.attention import Span
from chatserve.model.flash import DecodeKernel, FlashKernels
from chatserve.model.spans import BLOCK_TOKENS, TILE_TOKENS, decode_plan
from kvstore import KVLayout, KVStore, Lease
from kvstore.cuda import CudaMemory

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_LAYERS = 32, 8, 128, 32
LAYERS_USED = 8  # timed in turn, so that no layer's rows are still in the cache
PREFILLS = [(1, 512, 8192), (1, 512, 32768), (1, 4096, 32768), (8, 256, 8192), (16, 2048, 8192), (1, 32, 30000)]
DECODES = [(64, 4096), (16, 16384), (1, 131072), (256, 1500), (1, 600)]
BUDGET_BYTES = 64 << 30
REPETITIONS = 7
dtype, device = torch.bfloat16, torch.device("cuda")


def main() -> None:
    """Every shape, each beside its rivals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("attention_kernels: no CUDA device")
    rows = []
    for row in all_rows():
        cells = (f"{name} {value:,.2f}" if isinstance(value, float) else str(value) for name, value in row.items())
        print("  ".join(cells), flush=True)
        rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


def all_rows() -> Iterator[dict[str, Any]]:
    """One after the other, as they are measured."""
    yield {"what": "copy", "GB/s": copy_rate()}
    yield from (prefill_row(*shape) for shape in PREFILLS)
    yield from (decode_row(*shape) for shape in DECODES)
    yield shared_row()


def make_store(max_tokens: int, max_ranges: int) -> KVStore:
    """A store of Llama-3-8B's rows in CUDA virtual memory."""
    layout = KVLayout(NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, dtype, 2 << 20)
    memory = CudaMemory(layout.page_bytes, stream=torch.cuda.current_stream().cuda_stream)
    return KVStore(
        layout, memory, budget_bytes=BUDGET_BYTES, max_tokens=max_tokens, max_ranges=max_ranges, fingerprint=b"bench",
        tile_tokens=TILE_TOKENS,
    )  # fmt: skip


def fill(store: KVStore, batch: int, length: int) -> list[Lease]:
    """`batch` sessions with `length` random rows each."""
    leases = []
    for index in range(batch):
        lease = store.lease(f"s{index}", b"", [index])
        lease.grow(length)
        lease.guard(length)
        leases.append(lease)
    store.settle()
    for lease in leases:
        store.arena[lease.base_token : lease.base_token + length].normal_()
    return leases


def prefill_row(batch: int, new: int, history: int) -> dict[str, Any]:
    """Times of one prefill shape."""
    length = history + new
    store = make_store(length, batch)
    leases = fill(store, batch, length)
    flash = FlashKernels(store.arena, NUM_HEADS)
    q = torch.randn(batch * new, NUM_HEADS, HEAD_DIM, dtype=dtype, device=device)
    out = torch.empty_like(q)
    spans = [Span(i * new, new, lease.base_token, length) for i, lease in enumerate(leases)]
    flash.plan_ragged(spans)
    flash.plan_paged(spans, counting_blocks(leases, length))
    times = {
        "virtual FA3 ragged": timed(lambda layer: flash.run_ragged(layer, q, out)),
        "virtual FA2 paged": timed(lambda layer: flash.run_paged(layer, q, out)),
    }
    close(store)
    times |= {f"{kind} paged": paged_prefill(kind, q, batch, new, length) for kind in ("fa3", "fa2")}
    flops = 4 * batch * new * (history + new / 2) * NUM_HEADS * HEAD_DIM
    best = min(times["virtual FA3 ragged"], times["virtual FA2 paged"])
    return {
        "what": f"prefill {batch} x {new} on {history}", **times, "TFLOP/s": flops / best / 1e6,
        "over FA3 paged": times["fa3 paged"] / best, "over FA2 paged": times["fa2 paged"] / best,
    }  # fmt: skip


def decode_row(batch: int, length: int) -> dict[str, Any]:
    """Times of one decode shape."""
    store = make_store(length, batch)
    leases = fill(store, batch, length)
    flash = FlashKernels(store.arena, NUM_HEADS)
    kernel = DecodeKernel(flash, counting_blocks(leases, length))
    kernel.plan(decode_plan(np.full(batch, length, np.int32)))
    q = torch.randn(batch, NUM_HEADS, HEAD_DIM, dtype=dtype, device=device)
    out = torch.empty_like(q)
    ours = timed(lambda layer: kernel.run(layer, q, out))
    close(store)
    paged = paged_decode(q, batch, length)
    num_bytes = batch * length * 2 * NUM_KV_HEADS * HEAD_DIM * 2
    return {
        "what": f"decode {batch} x {length}", "virtual": ours, "paged": paged, "GB/s": num_bytes / ours / 1e3,
        "over paged": paged / ours,
    }  # fmt: skip


def shared_row(batch: int = 64, length: int = 4096) -> dict[str, Any]:
    """Decoding 64 sessions on one set of physical pages, and on pages of their own."""
    store = make_store(length + BLOCK_TOKENS, batch + 1)
    owner = fill(store, 1, length)[0]
    owner.commit(range(length - 1))
    owner.release()
    leases = [store.lease(f"b{index}", b"", [*range(length - 1), 0]) for index in range(batch)]
    store.settle()
    flash = FlashKernels(store.arena, NUM_HEADS)
    shared = length - BLOCK_TOKENS
    kernel = DecodeKernel(flash, counting_blocks(leases, shared))
    kernel.plan(decode_plan(np.full(batch, shared, np.int32)))
    q = torch.randn(batch, NUM_HEADS, HEAD_DIM, dtype=dtype, device=device)
    out = torch.empty_like(q)
    aliased = timed(lambda layer: kernel.run(layer, q, out))
    assert store.stats().pages.created < 2 * length * batch // BLOCK_TOKENS // 8
    close(store)
    own = decode_row(batch, shared)["virtual"]
    return {"what": f"decode {batch} x {shared} on one prefix", "aliased": aliased, "own": own, "gain": own / aliased}


def counting_blocks(leases: Sequence[Lease], length: int) -> Tensor:
    """The sessions' blocks, each counting up from its base."""
    count = -(-length // BLOCK_TOKENS)
    firsts = [lease.base_token // BLOCK_TOKENS for lease in leases]
    return torch.cat([torch.arange(first, first + count, dtype=torch.int32) for first in firsts]).to(device)


def random_pool(batch: int, length: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """A pool a layer, its table, block counts as indptr, and last lengths: what a paged engine keeps."""
    count = -(-length // BLOCK_TOKENS)
    shape = (batch * count, 2, BLOCK_TOKENS, NUM_KV_HEADS, HEAD_DIM)
    pools = [torch.randn(shape, dtype=dtype, device=device) for _ in range(LAYERS_USED)]
    table = torch.randperm(batch * count, device=device, dtype=torch.int32)
    indptr = torch.arange(batch + 1, dtype=torch.int32) * count
    return pools, table, indptr, torch.full((batch,), length - (count - 1) * BLOCK_TOKENS, dtype=torch.int32)


def paged_prefill(kind: str, q: Tensor, batch: int, new: int, length: int) -> float:
    """Microseconds of FlashInfer's paged prefill."""
    pools, table, indptr, last = random_pool(batch, length)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", backend=kind)
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32) * new, indptr, table, last, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM,
        BLOCK_TOKENS, causal=True, q_data_type=dtype, kv_data_type=dtype,
    )  # fmt: skip
    return timed(lambda layer: wrapper.run(q, pools[layer]))


def paged_decode(q: Tensor, batch: int, length: int) -> float:
    """Microseconds of FlashInfer's tensor-core decode."""
    pools, table, indptr, last = random_pool(batch, length)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD", use_tensor_cores=True)
    wrapper.plan(
        indptr, table, last, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_TOKENS, q_data_type=dtype, kv_data_type=dtype
    )
    return timed(lambda layer: wrapper.run(q, pools[layer]))


def workspace() -> Tensor:
    """Scratch memory for a kernel."""
    return torch.empty(384 << 20, dtype=torch.uint8, device=device)


def timed(run: Callable[[int], Any]) -> float:
    """Median microseconds of a layer, over captured rounds of `LAYERS_USED` layers."""
    for layer in range(LAYERS_USED):
        run(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for layer in range(LAYERS_USED):
            run(layer)
    times = []
    for _ in range(REPETITIONS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / LAYERS_USED)
    return median(times[1:])


def copy_rate() -> float:
    """GB/s of a large device copy, read plus write."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    target.copy_(source)
    start.record()
    for _ in range(4):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 4 * 2 * source.nbytes / start.elapsed_time(end) / 1e6


def close(store: KVStore) -> None:
    """Give the memory back before the next shape takes its own."""
    torch.cuda.synchronize()
    store.close()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
