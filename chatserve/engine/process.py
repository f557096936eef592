"""The engine's process: `python -m chatserve.engine.process FD`, a child of the front end.

It reads its configuration from the socket, loads the model, and steps while there is work. It ends when the front
end's socket closes, and dies with the front end's process.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys

import torch

from chatserve.engine.api import EngineInfo
from chatserve.engine.config import EngineConfig
from chatserve.engine.core import EngineCore
from chatserve.engine.runner import Runner
from chatserve.engine.wire import ChannelClosed, SyncChannel
from chatserve.errors import StartupError
from chatserve.model.config import ModelConfig, model_config
from chatserve.model.weights import load_decoder, weights_fingerprint
from chatserve.pretrained import Pretrained, load_pretrained
from kvstore import KVLayout, KVStore, PosixMemory, default_page_bytes

IDLE_SHRINK_S = 5.0
MAX_RANGES = 2048
MAX_ARENA_TOKENS = 2**31 - 1
MAX_ARENA_BYTES = 2**45
PR_SET_PDEATHSIG = 1
logger = logging.getLogger(__name__)


def main() -> None:
    """Serve the front end at the inherited socket until it closes."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front end's to handle: it drains first
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    channel = SyncChannel(socket.socket(fileno=int(sys.argv[1])))
    try:
        core = _start(channel)
        if core is not None:
            serve(channel, core)
    except ChannelClosed:
        logger.info("front end closed its socket; the engine ends")


def die_with_parent() -> None:
    """Ask Linux to kill this process when the front end dies; elsewhere the closed socket does it a little later."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            raise SystemExit("the front end died before its engine had started")


def serve(channel: SyncChannel, core: EngineCore) -> None:
    """Commands in, one step, one message out, for ever; raises ChannelClosed at the end."""
    while True:
        frames = channel.receive(IDLE_SHRINK_S if core.idle else 0)
        for command in (command for frame in frames for command in frame):
            core.handle(command)
        if core.idle and not frames:
            core.store.shrink()
        else:
            core.step()
            channel.send(core.take_events())


def _start(channel: SyncChannel) -> EngineCore | None:
    frames = channel.receive(None)
    config = EngineConfig.from_map(frames[0][0])
    try:
        core, info = build(config)
    except (StartupError, OSError, ValueError) as error:
        channel.send([["failed", str(error)]])
        return None
    channel.send([["ready", {name: getattr(info, name) for name in EngineInfo.__slots__}]])
    return core


def build(config: EngineConfig) -> tuple[EngineCore, EngineInfo]:
    """Load the model and reserve its KV store; raises StartupError naming what is wrong and the remedy."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    pretrained = load_pretrained(config.model)
    model = model_config(pretrained)
    dtype = _dtype(config)
    decoder = load_decoder(pretrained, model, dtype=dtype, device=torch.device(config.device))
    store = _build_store(config, model, pretrained, dtype)
    runner = Runner(decoder, store.arena)
    core = EngineCore(
        store,
        runner,
        max_context=_max_context(config, model),
        max_step_tokens=config.max_step_tokens,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
    )
    info = EngineInfo(
        model=config.model,
        max_context=core.max_context,
        capacity_tokens=config.kv_device_bytes // store.layout.token_bytes,
        page_bytes=store.layout.page_bytes,
        token_bytes=store.layout.token_bytes,
        device=config.device,
        dtype=str(dtype).removeprefix("torch."),
        attention=runner.attention_name,
    )
    return core, info


def _build_store(config: EngineConfig, model: ModelConfig, pretrained: Pretrained, dtype: torch.dtype) -> KVStore:
    page_bytes = config.page_bytes or default_page_bytes(config.kv_device_bytes)
    layout = KVLayout(model.num_layers, model.num_kv_heads, model.head_dim, dtype, page_bytes)
    max_tokens = _max_context(config, model)
    range_bytes = layout.range_bytes(max_tokens, tile_tokens=0)
    max_ranges = min(MAX_RANGES, MAX_ARENA_BYTES // range_bytes, MAX_ARENA_TOKENS * layout.token_bytes // range_bytes)
    return KVStore(
        layout,
        PosixMemory(page_bytes),
        budget_bytes=config.kv_device_bytes,
        max_tokens=max_tokens,
        max_ranges=max_ranges,
        fingerprint=weights_fingerprint(pretrained.directory),
        prefix_sharing=config.prefix_sharing,
    )


def _max_context(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_context and config.max_context > model.max_position:
        raise StartupError(
            f"--max-context {config.max_context} exceeds the model's {model.max_position} tokens; choose at most that"
        )
    return config.max_context or model.max_position


def _dtype(config: EngineConfig) -> torch.dtype:
    names = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if config.dtype not in names:
        raise StartupError(f"--dtype {config.dtype!r} is unknown; choose one of {', '.join(names)}")
    return names[config.dtype]


if __name__ == "__main__":
    main()
