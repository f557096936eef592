"""What copies between tiers cost the sessions that run meanwhile: decoding with and without them, in turns.

The engine runs in this process, on random weights in the shape of `--model` (see `make_model.py`). Sessions decode; in
some phases others' histories are brought back from host memory without pause, in some the running ones' are saved.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from profile_steps import Load

from chatserve.engine.build import build
from chatserve.engine.config import EngineConfig
from chatserve.model.config import model_config
from chatserve.pretrained import load_pretrained

IDLE_S = 4.0


def main() -> None:
    """Fill host memory, then phases of steps, quiet and busy by turns."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", required=True)
    made.add_argument("--device", default="cuda")
    made.add_argument("--sessions", type=int, default=64)
    made.add_argument("--history", type=int, default=2000, help="tokens of each decoding session")
    made.add_argument("--others", type=int, default=10, help="sessions that come and go")
    made.add_argument("--other-tokens", type=int, default=4096)
    made.add_argument("--phases", type=int, default=8, help="of each kind")
    made.add_argument("--steps", type=int, default=40, help="of one phase")
    arguments = made.parse_args()
    config = EngineConfig(model=arguments.model, device=arguments.device, load_format="dummy")
    bench = Moving(config, arguments)
    steps_ms, moved = bench.measure()
    print(f"decoding, {arguments.sessions} sessions on {arguments.history} tokens: {steps_ms['quiet']:.3f} ms a step")
    for kind in ("up", "down"):
        ratio, rate = steps_ms[kind] / steps_ms["quiet"], moved[kind] / 1e9
        print(f"beside copies {kind}, {rate:.1f} GB/s: {steps_ms[kind]:.3f} ms, ratio {ratio:.4f}")


class Moving:
    """An engine with decoding sessions and room for others."""

    def __init__(self, config: EngineConfig, arguments: argparse.Namespace) -> None:
        model = model_config(load_pretrained(arguments.model))
        token_bytes = model.num_layers * 2 * model.kv_size * (2 if arguments.device == "cuda" else 4)
        resident = arguments.sessions * (arguments.history + 4 * arguments.phases * arguments.steps)
        others = arguments.others * arguments.other_tokens
        sized = {"kv_device_bytes": 3 * resident * token_bytes, "kv_host_bytes": (resident + 2 * others) * token_bytes}
        core, info = build(replace(config, **sized))
        self._core, self._load, self._arguments = core, Load(core, info.vocab_size), arguments
        self._others = [self._load.ids(arguments.other_tokens) for _ in range(arguments.others)]
        self._next = 0

    def measure(self) -> tuple[dict[str, float], dict[str, float]]:
        """Milliseconds a step by kind of phase, medians, and bytes a second that were copied in them."""
        self._fill()
        steps = self._arguments.steps
        for index in range(self._arguments.sessions):
            ids = self._load.ids(self._arguments.history)
            self._load.submit(f"d{index}", ids, (3 * self._arguments.phases + 1) * steps)
        self._load.until_decoding()
        phases: dict[str, list[float]] = {"quiet": [], "up": [], "down": []}
        moved, seconds = dict.fromkeys(phases, 0.0), dict.fromkeys(phases, 0.0)
        for number in range(3 * self._arguments.phases):
            kind = list(phases)[number % 3]
            before, began_s = self._copied_bytes(), time.perf_counter()
            for _ in range(steps):
                self._beside(kind)
                self._load.step(1)
            took_s = time.perf_counter() - began_s
            phases[kind].append(took_s * 1000 / steps)
            moved[kind] += self._copied_bytes() - before
            seconds[kind] += took_s
        rates = {kind: moved[kind] / seconds[kind] for kind in phases}
        return {kind: median(times) for kind, times in phases.items()}, rates

    def _beside(self, kind: str) -> None:
        """What the tiers do beside a step."""
        if kind == "up":
            self._warm()
        elif kind == "down":
            self._core.store.tend(idle=True)  # as if nobody needed the device

    def _fill(self) -> None:
        """Compute every other session once, and let it go down."""
        for index, ids in enumerate(self._others):
            self._load.submit(f"o{index}", ids, 1)
            while not self._core.idle:
                self._load.step(1)
            end_s = time.monotonic() + IDLE_S
            while self._core.offload() and time.monotonic() < end_s:
                time.sleep(0.0005)

    def _warm(self) -> None:
        """Push the last one out and let the next of the others come, unless one is still on its way."""
        if self._core.store.is_moving:
            return
        number = self._next % len(self._others)
        self._next += 1
        self._core.store._residency.evict(len(self._others[0]))
        tokens = np.array(self._others[number], np.int32)
        self._core.handle({"verb": "warm", "session_id": f"o{number}", "tenant": "t", "token_ids": tokens.tobytes()})

    def _copied_bytes(self) -> int:
        stats = self._core.store.stats()
        return (stats.promoted_host_pages + stats.offloaded_pages) * stats.page_bytes


if __name__ == "__main__":
    with torch.inference_mode():
        main()
