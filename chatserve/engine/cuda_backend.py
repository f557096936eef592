"""The engine's side of a CUDA device: one compute stream, KV memory by virtual addresses, the fastest kernels found."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

import torch

from chatserve.engine.build import Limits
from chatserve.engine.defaults import gpu_kv_bytes
from chatserve.engine.runner import Runner, TorchRunner
from chatserve.model.attention import SdpaAttention
from chatserve.model.config import ModelConfig
from chatserve.model.decoder import Decoder
from chatserve.model.spans import TILE_TOKENS
from kvstore import KVLayout, KVStore, VirtualMemory
from kvstore.cuda import CudaMemory
from kvstore.cuda_transfer import CudaTransfers
from kvstore.driver import CudaDriver
from kvstore.pinned import PinnedBuffers

GRANULARITY_BYTES = 2 << 20  # of CUDA's virtual memory on every GPU known
MAX_PAGE_TOKENS = 64
AHEAD_TOKENS = 8
SPARE_BYTES = 128 << 20  # made ahead, so that a step seldom waits for new memory
WORKSPACE_BYTES = 1 << 30
SWITCH_INTERVAL_S = 0.0002
FLASH_HEAD_DIMS = (64, 128, 256)
FLASH_RUNNER_MODULE = "chatserve.engine.cuda_runner"  # loaded by name: it needs flashinfer


class CudaBackend:
    """See `Backend`. Makes its own stream the current one: all work on KV pages is ordered by it."""

    dtype = torch.bfloat16
    ahead_tokens = AHEAD_TOKENS

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.has_flash = find_spec("flashinfer") is not None
        self.tile_tokens = TILE_TOKENS if self.has_flash else 0
        self._driver = CudaDriver(self.device.index)
        self._stream = torch.cuda.Stream()
        torch.cuda.set_stream(self._stream)
        sys.setswitchinterval(SWITCH_INTERVAL_S)  # the mapping thread needs the interpreter for moments only

    def describe(self) -> dict[str, str]:
        """See `Backend.describe`."""
        properties = torch.cuda.get_device_properties(self.device)
        free, total = torch.cuda.mem_get_info()
        return {
            "Device": f"{properties.name}, compute capability {properties.major}.{properties.minor}",
            "Driver": self._driver.version(),
            "Device memory": f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
            "Page granularity": f"{self._driver.granularity() >> 10} KiB",
        }

    def kv_bytes(self, model: ModelConfig, limits: Limits) -> int:
        """Most of what the model and the steps' intermediate results leave."""
        per_token = 6 * model.intermediate_size + 4 * model.q_size + 4 * model.hidden_size
        steps = limits.max_step_tokens * per_token * self.dtype.itemsize + limits.max_running * model.vocab_size * 8
        free, _ = torch.cuda.mem_get_info()
        return gpu_kv_bytes(max(0, free - WORKSPACE_BYTES - steps))

    def page_bytes(self, kv_bytes: int, token_bytes: int) -> int:
        """Large pages, since mapping one takes 30 us whatever its size, but of no more than 64 tokens: they are shared.

        With 64 tokens a page the half-filled last pages of sessions are a few percent of their histories.
        """
        page_bytes = GRANULARITY_BYTES
        while 2 * page_bytes <= MAX_PAGE_TOKENS * token_bytes:
            page_bytes *= 2
        return page_bytes

    def memory(self, page_bytes: int) -> CudaMemory:
        """See `Backend.memory`."""
        return CudaMemory(
            page_bytes,
            stream=self._stream.cuda_stream,
            device=self.device.index,
            spare_pages=SPARE_BYTES // page_bytes,
        )

    def transfers(self, memory: VirtualMemory) -> CudaTransfers:
        """See `Backend.transfers`."""
        assert isinstance(memory, CudaMemory)
        return CudaTransfers(self._driver, self._stream.cuda_stream, memory.home)

    def buffers(self, num_bytes: int, page_bytes: int) -> PinnedBuffers:
        """See `Backend.buffers`."""
        return PinnedBuffers(num_bytes, page_bytes, self._driver)

    def runner(self, decoder: Decoder, store: KVStore, limits: Limits) -> Runner:
        """FlashInfer's kernels where they can be used, else torch's, which are slower; the name says why."""
        reason = self._flash_missing(store.layout)
        if reason:
            runner = TorchRunner(decoder, SdpaAttention(store.arena), store.arena)
            runner.attention_name += f" ({reason})"
            return runner
        return self._flash_runner(decoder, store, limits)

    def _flash_missing(self, layout: KVLayout) -> str | None:
        if not self.has_flash:
            return "flashinfer is not installed: pip install 'chatserve[cuda]'"
        if layout.dtype is torch.float32:
            return "flashinfer has no float32 kernels: use --dtype bfloat16"
        if layout.head_dim not in FLASH_HEAD_DIMS:
            return f"flashinfer has no kernels for head_dim {layout.head_dim}"
        return None

    def _flash_runner(self, decoder: Decoder, store: KVStore, limits: Limits) -> Runner:
        lease = store.lease("warm-up", b"", [0])
        lease.grow(min(TILE_TOKENS, store.max_session_tokens))
        store.settle()
        runner: Runner = import_module(FLASH_RUNNER_MODULE).CudaRunner(
            decoder,
            store.arena,
            lease,
            max_step_tokens=limits.max_step_tokens,
            max_running=limits.max_running,
            max_context=limits.max_context,
        )
        lease.release()
        store.drop_session("warm-up")
        return runner
