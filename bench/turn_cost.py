"""Time to first token of a 16-token turn on resident histories, with reuse on and off, beside transformers.

Every figure comes from this one run on the CPU with the bundled model; the reuse columns cross the process boundary
to the engine as a server's turn does. `transformers` does what a stateless server does: the whole prompt, each turn.

    python bench/turn_cost.py [--repeats 7] [--plot bench/results/turn_cost.png]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path

import matplotlib as mpl
import torch
from transformers import AutoModelForCausalLM

from chatserve.engine.api import GenerationRequest, Tokens
from chatserve.engine.client import EngineClient
from chatserve.engine.config import EngineConfig
from chatserve.pretrained import load_pretrained

mpl.use("Agg")
from matplotlib import pyplot as plt

HISTORIES = (256, 1024, 3500)
NEW_TOKENS = 16
FIRST_ORDINARY_TOKEN = 300  # past special tokens and single bytes


def main() -> None:
    """Measure, print the table, write the plot; exit status 1 when an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--plot", type=Path, default=Path("bench/results/turn_cost.png"))
    arguments = parser.parse_args()
    columns = asyncio.run(measure_engine(arguments.repeats))
    columns["transformers"] = measure_transformers(max(3, arguments.repeats // 2))
    print_table(columns)
    plot(columns, arguments.plot)
    raise SystemExit(0 if aims_met(columns) else 1)


async def measure_engine(repeats: int) -> dict[str, list[float]]:
    """Median time to first token in ms by history, reuse on and off."""
    engine = EngineClient(EngineConfig(model="bundled"))
    await engine.start()
    try:
        return {
            name: [await median_turn(engine, history, repeats, reuse=reuse) for history in HISTORIES]
            for name, reuse in (("reuse on", True), ("reuse off", False))
        }
    finally:
        await engine.close()


async def median_turn(engine: EngineClient, history: int, repeats: int, *, reuse: bool) -> float:
    """Turns of `NEW_TOKENS` different tokens on one history: the first two warm up, the median of the rest counts."""
    times = []
    ids = random_ids(history, seed=history)
    for turn in range(repeats + 2):
        token_ids = ids + random_ids(NEW_TOKENS, seed=1000 * history + turn)
        request = GenerationRequest(
            request_id=f"{history}-{reuse}-{turn}", session_id=f"{history}-{reuse}", tenant="bench",
            token_ids=token_ids, num_history=history if turn else 0, max_output_tokens=1, reuse=reuse,
        )  # fmt: skip
        times.append(await time_to_first_token(engine, request))
    return statistics.median(times[2:])


async def time_to_first_token(engine: EngineClient, request: GenerationRequest) -> float:
    """Milliseconds from submission to the first token at the front end."""
    start, first = time.perf_counter(), 0.0
    async for progress in engine.generate(request):
        if isinstance(progress, Tokens) and not first:
            first = time.perf_counter() - start
    return first * 1000


def measure_transformers(repeats: int) -> list[float]:
    """Median time of `generate` for one token over the whole prompt, in ms by history."""
    model = AutoModelForCausalLM.from_pretrained(load_pretrained("bundled").directory, dtype=torch.float32)
    columns = []
    for history in HISTORIES:
        ids = torch.tensor([random_ids(history + NEW_TOKENS, seed=history)])
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)
            times.append((time.perf_counter() - start) * 1000)
        columns.append(statistics.median(times[1:]))
    return columns


def random_ids(count: int, *, seed: int) -> list[int]:
    """Ordinary token ids; which ones does not matter to the time."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_ORDINARY_TOKEN, FIRST_ORDINARY_TOKEN + 500, (count,), generator=generator)
    return list(ids.tolist())


def print_table(columns: dict[str, list[float]]) -> None:
    """The medians, then the ratios the project promises."""
    print(f"time to first token of a {NEW_TOKENS}-token turn, ms")
    print(f"{'history':>8} " + " ".join(f"{name:>14}" for name in columns))
    for row, history in enumerate(HISTORIES):
        print(f"{history:>8} " + " ".join(f"{values[row]:>14.2f}" for values in columns.values()))
    on, off, stateless = columns["reuse on"], columns["reuse off"], columns["transformers"]
    print(f"reuse on, {HISTORIES[-1]} over {HISTORIES[0]}: {on[-1] / on[0]:.2f}x (aim: at most 2)")
    print(f"reuse off over on at {HISTORIES[-1]}: {off[-1] / on[-1]:.1f}x (aim: at least 10)")
    print(f"transformers over reuse on at {HISTORIES[-1]}: {stateless[-1] / on[-1]:.1f}x (aim: at least 10)")


def aims_met(columns: dict[str, list[float]]) -> bool:
    """Whether all three ratios hold."""
    on, off, stateless = columns["reuse on"], columns["reuse off"], columns["transformers"]
    return on[-1] <= 2 * on[0] and min(off[-1], stateless[-1]) >= 10 * on[-1]


def plot(columns: dict[str, list[float]], path: Path) -> None:
    """One line a column over the history's length, time on a logarithmic axis."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, values in columns.items():
        axes.plot(HISTORIES, values, marker="o", label=name)
    axes.set(xlabel="history, tokens", ylabel="time to first token, ms", yscale="log")
    axes.set_title(f"A {NEW_TOKENS}-token turn on a resident history (bundled model, CPU, fp32)")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"plot: {path}")


if __name__ == "__main__":
    main()
