"""Tokens a second of 16 sessions decoding together against one, with histories of 100 and 2,000 tokens.

Counted at the front end while all sessions decode, on the CPU with the bundled model, both in one run.

    python bench/batching.py [--sessions 16] [--tokens 96]
"""

from __future__ import annotations

import argparse
import asyncio
import time

import torch

from chatserve.engine.api import GenerationRequest, Tokens
from chatserve.engine.client import EngineClient
from chatserve.engine.config import EngineConfig

HISTORIES = (100, 2000)
AIM = 3.0  # at the shortest history
FIRST_ORDINARY_TOKEN = 300


def main() -> None:
    """Measure and print; exit status 1 when the aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    arguments = parser.parse_args()
    ratios = asyncio.run(measure(arguments.sessions, arguments.tokens))
    print(f"aim at {HISTORIES[0]} tokens of history: at least {AIM:g}x")
    raise SystemExit(0 if ratios[0] >= AIM else 1)


async def measure(sessions: int, tokens: int) -> list[float]:
    """The ratio of rates by history; alone, together and alone again, so that a drift of the machine shows."""
    engine = EngineClient(EngineConfig(model="bundled"))
    await engine.start()
    ratios = []
    print(f"{'history':>8} {'1 session':>12} {f'{sessions} sessions':>12} {'ratio':>7}   tokens a second")
    try:
        for history in HISTORIES:
            await rate(engine, 1, history, tokens)  # warms up
            alone = [await rate(engine, 1, history, 4 * tokens)]
            together = await rate(engine, sessions, history, tokens)
            alone.append(await rate(engine, 1, history, 4 * tokens))
            ratios.append(together / (sum(alone) / 2))
            print(f"{history:>8} {sum(alone) / 2:>12.1f} {together:>12.1f} {ratios[-1]:>7.2f}")
    finally:
        await engine.close()
    return ratios


async def rate(engine: EngineClient, sessions: int, history: int, tokens: int) -> float:
    """Tokens a second of all sessions, from the moment the last one started to the first one's end.

    Their histories are prefilled before, so that they decode together from the start.
    """
    prompts = [await prefill(engine, index, history) for index in range(sessions)]
    arrivals = await asyncio.gather(*(decode(engine, index, ids, tokens) for index, ids in enumerate(prompts)))
    start, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    return sum(start < t <= end for times in arrivals for t in times) / (end - start)


async def prefill(engine: EngineClient, index: int, history: int) -> list[int]:
    """Give a session `history` tokens of its own; returns them with the one sampled after."""
    generator = torch.Generator().manual_seed(1000 * history + index)
    ids = torch.randint(FIRST_ORDINARY_TOKEN, FIRST_ORDINARY_TOKEN + 500, (history,), generator=generator).tolist()
    return ids + [token for token, _ in await run(engine, index, ids, num_history=0, tokens=1)]


async def decode(engine: EngineClient, index: int, ids: list[int], tokens: int) -> list[float]:
    """When each of `tokens` more tokens of the session arrived."""
    return [arrived for _, arrived in await run(engine, index, ids, num_history=len(ids) - 1, tokens=tokens)]


async def run(
    engine: EngineClient, index: int, ids: list[int], *, num_history: int, tokens: int
) -> list[tuple[int, float]]:
    """One greedy request that only its length ends: its tokens and their times of arrival."""
    request = GenerationRequest(
        request_id=f"r{index}", session_id=f"s{index}", tenant="bench", token_ids=ids, num_history=num_history,
        max_output_tokens=tokens,
    )  # fmt: skip
    arrivals: list[tuple[int, float]] = []
    async for progress in engine.generate(request):
        if isinstance(progress, Tokens):
            arrivals += [(token, time.perf_counter()) for token in progress.token_ids]
    return arrivals


if __name__ == "__main__":
    main()
