"""What `chatserve doctor` reports: devices, packages, the kernels that would be used, and whether they work here.

The self-test is the real thing on a small scale: an engine with a random model in the device's virtual memory, two
sessions that share pages, and the logits of its kernels beside those of plain torch.
"""

from __future__ import annotations

import os
import platform
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from chatserve.engine.build import Backend, Limits, choose_backend, kv_layout
from chatserve.engine.config import DeviceName, EngineConfig
from chatserve.engine.core import EngineCore
from chatserve.model.attention import SdpaAttention, Span
from chatserve.model.config import ModelConfig
from chatserve.model.decoder import Decoder
from chatserve.model.operations import Operations, TorchOperations
from chatserve.model.rotated import RotatedAttention
from chatserve.model.weights import random_decoder
from kvstore import KVStore

PACKAGES = ("torch", "transformers", "cuda-bindings", "flashinfer-python", "websockets", "redis")
TOLERANCE = 2e-2
KV_BYTES = 256 << 20
MAX_RANGES = 8
NUM_TOKENS = 600
NUM_SHARED = 512
LIMITS = Limits(max_context=1024, max_step_tokens=512, max_running=4)
MODEL = ModelConfig(
    family="llama", vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=64, rms_norm_eps=1e-5, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False, tie_embeddings=False,
    max_position=1024, eos_token_ids=(), inv_freq=tuple(10_000 ** (-i / 32) for i in range(32)), attention_factor=1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `ok` False means that a server would not work as it should."""

    name: str
    value: str
    ok: bool = True


def examine(device: DeviceName) -> Iterator[Finding]:
    """Every finding, as it is made. Raises StartupError where the device cannot be used at all."""
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("Processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    for package in PACKAGES:
        yield Finding(package, _version(package))
    backend = choose_backend(EngineConfig(model="self-test", device=device))
    yield from (Finding(name, value) for name, value in backend.describe().items())
    yield from self_test(backend)


def self_test(backend: Backend) -> Iterator[Finding]:
    """Map, alias, write, read back, attend."""
    started = time.monotonic()
    decoder = random_decoder(MODEL, dtype=backend.dtype, device=backend.device)
    store = _make_store(backend)
    try:
        core = EngineCore(
            store, runner := backend.runner(decoder, store, LIMITS), max_context=LIMITS.max_context,
            max_step_tokens=LIMITS.max_step_tokens, max_running=LIMITS.max_running, max_waiting=LIMITS.max_running,
            ahead_tokens=backend.ahead_tokens,
        )  # fmt: skip
        yield Finding("Attention", runner.attention_name)
        yield from _test_engine(core, decoder)
    finally:
        store.close()
    yield Finding("Self-test", f"{time.monotonic() - started:.1f} s")


class RecordingOperations(TorchOperations):
    """Another `Operations` whose logits are kept."""

    def __init__(self, inner: Operations) -> None:
        self.embed = inner.embed  # type: ignore[method-assign]  # all but one are the other's
        self.norm_project = inner.norm_project  # type: ignore[method-assign]
        self.norm_gate = inner.norm_gate  # type: ignore[method-assign]
        self.add_projected = inner.add_projected  # type: ignore[method-assign]
        self._inner = inner
        self.recorded: list[Tensor] = []

    def logits(self, rows: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
        """See `Operations.logits`."""
        logits = self._inner.logits(rows, norm, eps, weight)
        self.recorded.append(logits.clone())
        return logits


def _test_engine(core: EngineCore, decoder: Decoder) -> Iterator[Finding]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(MODEL.vocab_size, (NUM_TOKENS,), generator=generator).tolist()
    second = first[:NUM_SHARED] + first[::-1][: NUM_TOKENS - NUM_SHARED]
    _answer(core, "first", first)
    plain, decoder.operations = decoder.operations, RecordingOperations(decoder.operations)
    cached = _answer(core, "second", second)
    recorded = decoder.operations.recorded[0][-1]
    decoder.operations = plain
    yield Finding("Shared pages", f"{cached} of {NUM_SHARED} tokens from another session's pages", cached > 0)
    yield _check_alias(core.store, first, second)
    expected = _reference(decoder, second)
    error = ((recorded - expected).norm() / expected.norm()).item()
    yield Finding("Logits", f"relative error {error:.1e} against torch (at most {TOLERANCE})", error < TOLERANCE)


def _answer(core: EngineCore, session_id: str, token_ids: Sequence[int]) -> int:
    """Run a request of one new token; returns how many tokens were cached."""
    core.handle(
        {
            "verb": "submit",
            "request_id": session_id,
            "session_id": session_id,
            "tenant": "doctor",
            "num_history": 0,
            "num_computed": 0,
            "history_hash": b"",
            "num_history_sent": 0,
            "token_ids": array("i", token_ids).tobytes(),
            "num_generated": 0,
            "max_output_tokens": 1,
            "sampling": {},
            "stop_token_ids": [],
            "reuse": True,
        }
    )
    while not core.idle:
        core.step()
    cached: int = next(event for event in core.take_events() if event[0] == "started")[2]["device"]
    return cached


def _check_alias(store: KVStore, *histories: Sequence[int]) -> Finding:
    """The sessions' first rows are one page at two addresses: they must read the same, and hold something."""
    names = ("first", "second")
    leases = [store.lease(name, b"doctor", ids) for name, ids in zip(names, histories, strict=True)]
    store.settle()
    rows = [store.arena[lease.base_token : lease.base_token + NUM_SHARED // 2] for lease in leases]
    same = torch.equal(rows[0], rows[1]) and bool(rows[0].any())
    for lease in leases:
        lease.release()
    return Finding("One page at two addresses", "reads the same" if same else "reads differently", same)


def _reference(decoder: Decoder, token_ids: Sequence[int]) -> Tensor:
    """The logits after the ids, in plain torch over a plain tensor."""
    device, dtype = decoder.embedding.device, decoder.embedding.dtype
    shape = (len(token_ids), MODEL.num_layers, 2, MODEL.num_kv_heads, MODEL.head_dim)
    attention = SdpaAttention(torch.zeros(shape, dtype=dtype, device=device))
    rotated = RotatedAttention(attention, MODEL, dtype=dtype, device=device)
    places = torch.arange(len(token_ids), device=device)
    step = rotated.plan([Span(0, len(token_ids), 0, len(token_ids))], places, places)
    fast, decoder.operations = decoder.operations, TorchOperations()
    logits: Tensor = decoder(torch.tensor(token_ids, device=device), step, places[-1:])[0]
    decoder.operations = fast
    return logits


def _make_store(backend: Backend) -> KVStore:
    layout = kv_layout(MODEL, backend.dtype, backend, KV_BYTES)
    return KVStore(
        layout, backend.memory(layout.page_bytes), budget_bytes=KV_BYTES, max_tokens=LIMITS.max_context,
        max_ranges=MAX_RANGES, fingerprint=b"doctor", tile_tokens=backend.tile_tokens,
    )  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
