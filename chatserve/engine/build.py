"""From a configuration to an engine: which device, which model, how much memory, which kernels."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch

from chatserve.engine.api import EngineInfo
from chatserve.engine.config import EngineConfig
from chatserve.engine.core import EngineCore
from chatserve.engine.defaults import (
    default_limits,
    disk_tier_bytes,
    host_kv_bytes,
    host_tier_bytes,
    usable_memory_bytes,
)
from chatserve.engine.planning import eviction_policy, start_planner
from chatserve.engine.runner import Runner, TorchRunner
from chatserve.errors import StartupError
from chatserve.model.attention import CpuAttention
from chatserve.model.config import ModelConfig, model_config
from chatserve.model.decoder import Decoder
from chatserve.model.weights import config_fingerprint, load_decoder, random_decoder, weights_fingerprint
from chatserve.pretrained import Pretrained, load_pretrained
from kvstore import EvictionPolicy, KVError, KVLayout, KVStore, PosixMemory, VirtualMemory, default_page_bytes
from kvstore.buffers import Buffers, PlainBuffers
from kvstore.disk import DiskTier
from kvstore.tiers import Below
from kvstore.transfer import FileTransfers, Transfers

MAX_RANGES = 2048
MIN_HOST_PAGES = 16
MAX_HOST_PERCENT = 90  # of main memory
MAX_ARENA_TOKENS = 2**31 - 1
MAX_ARENA_BYTES = 2**45
logger = logging.getLogger(__name__)
CUDA_MODULE = "chatserve.engine.cuda_backend"  # loaded by name: where CUDA is not installed it cannot be


@dataclass(frozen=True, slots=True)
class Limits:
    """The engine's bounds, decided: see `EngineConfig`."""

    max_context: int
    max_step_tokens: int
    max_running: int


class Backend(Protocol):
    """What differs between devices. `tile_tokens` and `ahead_tokens`: see `KVStore` and `Scheduler`."""

    device: torch.device
    dtype: torch.dtype
    tile_tokens: int
    ahead_tokens: int

    def describe(self) -> dict[str, str]:
        """What an operator wants to know about the device, by name."""
        ...

    def kv_bytes(self, model: ModelConfig, limits: Limits) -> int:
        """The KV budget where the operator gives none; asked once the model is loaded."""
        ...

    def page_bytes(self, kv_bytes: int, token_bytes: int) -> int:
        """The page size where the operator gives none."""
        ...

    def memory(self, page_bytes: int) -> VirtualMemory: ...

    def transfers(self, memory: VirtualMemory) -> Transfers:
        """Copies between that memory and the host's."""
        ...

    def buffers(self, num_bytes: int, page_bytes: int) -> Buffers:
        """Host memory for these copies."""
        ...

    def runner(self, decoder: Decoder, store: KVStore, limits: Limits) -> Runner: ...


class CpuBackend:
    """See `Backend`."""

    device = torch.device("cpu")
    dtype = torch.float32
    tile_tokens = 0
    ahead_tokens = 0

    def describe(self) -> dict[str, str]:
        """See `Backend.describe`."""
        return {"Device": "CPU", "KV memory by default": f"{host_kv_bytes() / 2**30:.1f} GiB"}

    def kv_bytes(self, model: ModelConfig, limits: Limits) -> int:
        """See `Backend.kv_bytes`."""
        return host_kv_bytes()

    def page_bytes(self, kv_bytes: int, token_bytes: int) -> int:
        """See `Backend.page_bytes`."""
        return default_page_bytes(kv_bytes)

    def memory(self, page_bytes: int) -> PosixMemory:
        """See `Backend.memory`."""
        return PosixMemory(page_bytes)

    def transfers(self, memory: VirtualMemory) -> Transfers:
        """See `Backend.transfers`."""
        assert isinstance(memory, PosixMemory)
        return FileTransfers(memory.file, memory.page_bytes)

    def buffers(self, num_bytes: int, page_bytes: int) -> PlainBuffers:
        """See `Backend.buffers`."""
        return PlainBuffers(num_bytes, page_bytes)

    def runner(self, decoder: Decoder, store: KVStore, limits: Limits) -> TorchRunner:
        """See `Backend.runner`."""
        return TorchRunner(decoder, CpuAttention(store.arena), store.arena)


def build(config: EngineConfig) -> tuple[EngineCore, EngineInfo]:
    """Load the model and reserve its KV store; raises StartupError naming what is wrong and the remedy."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    pretrained = load_pretrained(config.model)
    model = model_config(pretrained)
    backend = choose_backend(config)
    dtype = _dtype(config, backend)
    limits = _limits(config, model, backend)
    with _timed("loaded the weights"):
        decoder = _decoder(config, pretrained, model, dtype, backend)
    kv_bytes = config.kv_device_bytes or backend.kv_bytes(model, limits)
    layout = kv_layout(model, dtype, backend, kv_bytes, config.page_bytes)
    policy = eviction_policy(layout)
    store = _store(config, layout, kv_bytes, limits, backend, _fingerprint(config, pretrained), policy)
    with _timed("prepared the kernels"):
        runner = backend.runner(decoder, store, limits)
    core = EngineCore(
        store,
        runner,
        max_context=limits.max_context,
        max_step_tokens=limits.max_step_tokens,
        max_running=limits.max_running,
        max_waiting=config.max_waiting,
        ahead_tokens=backend.ahead_tokens,
        plan_evictions=partial(start_planner, store=store, policy=policy),
    )
    stats = store.stats()
    info = EngineInfo(
        model=config.model,
        max_context=core.max_context,
        vocab_size=model.vocab_size,
        capacity_tokens=kv_bytes // layout.token_bytes,
        page_bytes=layout.page_bytes,
        token_bytes=layout.token_bytes,
        device=backend.device.type,
        dtype=str(dtype).removeprefix("torch."),
        attention=runner.attention_name,
        host_bytes=stats.host_budget_bytes,
        disk_bytes=stats.disk_budget_bytes,
        max_running=limits.max_running,
    )
    return core, info


def kv_layout(model: ModelConfig, dtype: torch.dtype, backend: Backend, kv_bytes: int, page_bytes: int = 0) -> KVLayout:
    """The layout of the model's rows; `page_bytes` 0 leaves the size of a page to the backend."""
    token_bytes = model.num_layers * 2 * model.kv_size * dtype.itemsize
    chosen = page_bytes or backend.page_bytes(kv_bytes, token_bytes)
    return KVLayout(model.num_layers, model.num_kv_heads, model.head_dim, dtype, chosen)


def has_cuda() -> bool:
    """Whether torch finds a GPU and cuda-python is installed."""
    return torch.cuda.is_available() and find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


@contextmanager
def _timed(what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    logger.info("%s in %.1f s", what, time.monotonic() - started)


def choose_backend(config: EngineConfig) -> Backend:
    """The configured device's side; raises StartupError where it cannot be used."""
    if config.device == "cpu" or (config.device == "auto" and not has_cuda()):
        return CpuBackend()
    if not torch.cuda.is_available():
        raise StartupError(
            "--device cuda: torch finds no GPU; install its CUDA build and a driver, or use --device cpu"
        )
    if not has_cuda():
        raise StartupError("--device cuda needs cuda-python; install it with: pip install 'chatserve[cuda]'")
    backend: Backend = import_module(CUDA_MODULE).CudaBackend()
    return backend


def _limits(config: EngineConfig, model: ModelConfig, backend: Backend) -> Limits:
    if config.max_context and config.max_context > model.max_position:
        raise StartupError(
            f"--max-context {config.max_context} exceeds the model's {model.max_position} tokens; choose at most that"
        )
    defaults = default_limits(backend.device.type)
    return Limits(
        max_context=config.max_context or model.max_position,
        max_step_tokens=config.max_step_tokens or defaults.max_step_tokens,
        max_running=config.max_running or defaults.max_running,
    )


def _decoder(
    config: EngineConfig, pretrained: Pretrained, model: ModelConfig, dtype: torch.dtype, backend: Backend
) -> Decoder:
    if config.load_format == "dummy":
        return random_decoder(model, dtype=dtype, device=backend.device)
    return load_decoder(pretrained, model, dtype=dtype, device=backend.device)


def _fingerprint(config: EngineConfig, pretrained: Pretrained) -> bytes:
    if config.load_format == "dummy":
        return config_fingerprint(pretrained.directory)
    return weights_fingerprint(pretrained.directory)


def _store(
    config: EngineConfig,
    layout: KVLayout,
    kv_bytes: int,
    limits: Limits,
    backend: Backend,
    fingerprint: bytes,
    policy: EvictionPolicy,
) -> KVStore:
    range_bytes = layout.range_bytes(limits.max_context, backend.tile_tokens)
    max_ranges = min(MAX_RANGES, MAX_ARENA_BYTES // range_bytes, MAX_ARENA_TOKENS * layout.token_bytes // range_bytes)
    memory = backend.memory(layout.page_bytes)
    return KVStore(
        layout,
        memory,
        below=_below(config, layout, memory, backend),
        budget_bytes=kv_bytes,
        max_tokens=limits.max_context,
        max_ranges=max_ranges,
        fingerprint=fingerprint,
        prefix_sharing=config.prefix_sharing,
        tile_tokens=backend.tile_tokens,
        policy=policy,
    )


def _below(config: EngineConfig, layout: KVLayout, memory: VirtualMemory, backend: Backend) -> Below | None:
    """The tiers below the device; raises StartupError where they cannot be as the operator wants them."""
    host_bytes, disk_bytes = config.kv_host_bytes, config.kv_disk_bytes
    if host_bytes is None:
        host_bytes = host_tier_bytes(backend.device.type)
    if disk_bytes is None:
        disk_bytes = _disk_bytes(backend.device.type, Path(config.kv_disk_path))
    if not (host_bytes or disk_bytes):
        return None
    least = MIN_HOST_PAGES * layout.page_bytes
    if host_bytes < least:
        raise StartupError(
            f"--kv-host-memory {host_bytes} is too little: copies pass through it, also to disk; "
            f"give at least {least} bytes, or 0 with --kv-disk-space 0"
        )
    most = usable_memory_bytes() * MAX_HOST_PERCENT // 100
    if host_bytes > most:
        raise StartupError(f"--kv-host-memory {host_bytes} is more than this machine can spare; give at most {most}")
    open_disk = partial(_open_disk, Path(config.kv_disk_path), disk_bytes) if disk_bytes else None
    return Below(backend.buffers(host_bytes, layout.page_bytes), backend.transfers(memory), open_disk)


def _disk_bytes(device: str, directory: Path) -> int:
    disk_bytes = disk_tier_bytes(device, directory)
    if not disk_bytes:
        logger.warning("histories will not survive a restart: %s has next to no room; see --kv-disk-space", directory)
    return disk_bytes


def _open_disk(directory: Path, budget_bytes: int, fingerprint: bytes, page_bytes: int) -> DiskTier:
    try:
        return DiskTier(directory, budget_bytes=budget_bytes, fingerprint=fingerprint, page_bytes=page_bytes)
    except (KVError, ValueError) as error:
        raise StartupError(f"--kv-disk-path, --kv-disk-space: {error}") from error


def _dtype(config: EngineConfig, backend: Backend) -> torch.dtype:
    names = {
        "auto": backend.dtype, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16
    }  # fmt: skip
    if config.dtype not in names:
        raise StartupError(f"--dtype {config.dtype!r} is unknown; choose one of {', '.join(names)}")
    return names[config.dtype]
