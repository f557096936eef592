"""Where a step's time goes on a GPU: host time by phase and GPU time by kernel, for a few kinds of steps.

The engine runs in this process, on random weights in the shape of `--model` (see `make_model.py`). Host phases overlap
with the GPU's work: a step takes about the larger of the two.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from chatserve.engine.build import build
from chatserve.engine.config import EngineConfig
from chatserve.engine.core import EngineCore

MEASURED_STEPS = 20
PHASES = (("_scheduler", "schedule"), ("store", "settle"), ("_runner", "launch"), ("", "_commit"))
KERNELS = (
    ("attention", r"Prefill|Decode|flashinfer.*(Paged|Ragged)|MergeStates|VariableLengthMerge|hopper"),
    ("products, cuBLAS", r"gemm|cutlass|nvjet|splitK|cublas"),
    ("products, small batches", r"small_linear"),
    ("rope and KV write", r"rotate_and_store"),
    ("norm", r"[Nn]orm"),
    ("activation", r"silu|act_and_mul"),
    ("sampling", r"argmax|softmax|sampling"),
    ("copies", r"Memcpy|Memset"),
)


@dataclass
class HostTimes:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Count the time of every call of a method."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*arguments, **options)
            finally:
                self.seconds[phase] += time.perf_counter() - started

        setattr(owner, name, timed)


class Load:
    """Sessions on an engine, each with a history."""

    def __init__(self, core: EngineCore, vocab_size: int) -> None:
        self.core = core
        self._random = random.Random(0)
        self._vocab_size = vocab_size
        self._count = 0

    def ids(self, count: int) -> list[int]:
        """Random token ids."""
        return self._random.choices(range(self._vocab_size), k=count)

    def submit(self, session_id: str, token_ids: list[int], num_tokens: int) -> None:
        """Ask for a reply without an early end."""
        self._count += 1
        self.core.handle(
            {
                "verb": "submit", "request_id": f"r{self._count}", "session_id": session_id, "tenant": "t",
                "num_history": 0, "history_hash": b"", "num_history_sent": 0,
                "token_ids": array("i", token_ids).tobytes(), "num_generated": 0,
                "num_computed": 0, "max_output_tokens": num_tokens, "sampling": {}, "stop_token_ids": [], "reuse": True,
            }
        )  # fmt: skip

    def step(self, count: int) -> None:
        """Run steps."""
        for _ in range(count):
            self.core.step()
            self.core.take_events()

    def until_decoding(self) -> None:
        """Run until every request has its first token."""
        while any(request.started_s is None for request in self.core._requests.values()):
            self.step(1)

    def clear(self) -> None:
        """End everything."""
        for request in list(self.core._requests.values()):
            request.cancelled = True
        while not self.core.idle:
            self.step(1)


def main() -> None:
    """Build the engine, then one table a kind of step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a directory with config.json and a tokenizer")
    model = parser.parse_args().model
    with torch.cuda.device(0):
        core, info = build(EngineConfig(model=model, device="cuda", load_format="dummy"))
    print(f"{info.attention}; page {info.page_bytes >> 20} MiB; {info.capacity_tokens:,} tokens")
    load = Load(core, info.vocab_size)
    for sessions, history in ((1, 600), (64, 1800), (256, 1500), (16, 12_000)):
        decode(load, sessions, history)
    turn(load, 30_000, 32)
    mixed(load, 64, 1800, 128)
    prefill(load, 2048, 8192)


def decode(load: Load, sessions: int, history: int) -> None:
    """Steps of decodes only."""
    system = load.ids(min(1024, history // 2))
    for index in range(sessions):
        load.submit(f"d{index}", system + load.ids(history - len(system)), 500)
    load.until_decoding()
    load.step(5)
    report(f"decode, {sessions} sessions on {history} tokens", load, lambda: load.step(1))
    load.clear()


def turn(load: Load, history: int, new: int) -> None:
    """A few new tokens on a long resident history: from submission to first token."""
    ids = load.ids(history)
    load.submit("long", ids, 1)
    load.until_decoding()
    load.clear()

    def one_turn() -> None:
        ids.extend(load.ids(new))
        load.submit("long", list(ids), 1)
        while not load.core.idle:
            load.step(1)

    one_turn()
    report(f"turn, {new} new tokens on {history}", load, one_turn)


def mixed(load: Load, sessions: int, history: int, new: int) -> None:
    """Decodes with one session's new tokens in the same step."""
    for index in range(sessions):
        load.submit(f"m{index}", load.ids(history), 500)
    load.until_decoding()

    def one_step() -> None:
        load.submit(f"n{load._count}", load.ids(new), 1)
        load.step(1)

    report(f"mixed, {sessions} decodes on {history} and {new} new tokens", load, one_step)
    load.clear()


def prefill(load: Load, new: int, history: int) -> None:
    """Chunks of a long prompt."""
    load.submit("p", load.ids(history + (MEASURED_STEPS * 2 + 5) * 64), 1)
    load.step(3)
    load.clear()
    load.submit("q", load.ids(30_000), 1)
    load.step(history // new)
    report(f"prefill, chunks of {new}", load, lambda: load.step(1), steps=6)
    load.clear()


def report(title: str, load: Load, one: Callable[[], None], steps: int = MEASURED_STEPS) -> None:
    """Wall and host time of steps, then the GPU's kernels under a profiler."""
    with host_times(load.core) as host:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            one()
        wall = (time.perf_counter() - started) / steps * 1000
    gpu = gpu_times(one, min(steps, 6))
    print(f"\n== {title}: {wall:.2f} ms; GPU busy {sum(gpu.values()):.2f} ms")
    print("   host: " + ", ".join(f"{name} {spent / steps * 1000:.2f}" for name, spent in host.seconds.items()))
    print("   gpu:  " + ", ".join(f"{name} {spent:.2f}" for name, spent in sorted(gpu.items(), key=lambda i: -i[1])))


@contextmanager
def host_times(core: EngineCore) -> Iterator[HostTimes]:
    """Times of the step's phases; `wait` is for the GPU's tokens, a part of `_commit`."""
    times = HostTimes()
    watched = []
    for owner_name, method in PHASES:
        owner = getattr(core, owner_name) if owner_name else core
        watched.append((owner, method))
        times.watch(owner, method, method)
    step_class = type(core._in_flight) if core._in_flight is not None else None
    if step_class is not None:
        times.watch(step_class, "tokens", "of it waiting")
    yield times
    for owner, method in watched:
        delattr(owner, method)
    if step_class is not None:
        step_class.tokens = step_class.tokens.__closure__[0].cell_contents  # the method that was wrapped


def gpu_times(one: Callable[[], None], steps: int) -> dict[str, float]:
    """Milliseconds a step by kind of kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            one()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        if event.self_device_time_total:
            times[kind_of(event.key)] += event.self_device_time_total / steps / 1000
    return dict(times)


def kind_of(kernel: str) -> str:
    """The line of the table that a kernel belongs to."""
    return next((kind for kind, pattern in KERNELS if re.search(pattern, kernel)), "other")


if __name__ == "__main__":
    main()
