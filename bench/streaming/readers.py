"""What readers hear: each token's way from the engine's double to its reader, timed.

The double's tokens are one letter each, so the length of what was heard says which token was the last of it. Both use
the system's one monotonic clock.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from load.server import Server

from streaming.wire import Connection

TERMINAL = ("response.completed", "response.incomplete", "response.cancelled", "response.failed")
OPEN_AT_ONCE = 64
SETTLE_S = 1.0
INPUT_IDS = [300, 301, 302]


@dataclass(slots=True)
class Heard:
    """One response: (time, letters so far) of each message, and how it ended."""

    response_id: str = ""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    ended: str = ""


class Reader:
    """A connection with a session of its own, whose replies it times."""

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self._ended = asyncio.Event()

    async def open(self, url: str) -> None:
        """Connect, and make a session to follow."""
        self.connection = await Connection.open(url, self._hear)
        self.session_id = await self.connection.new_session()

    async def take_turn(self, num_tokens: int) -> None:
        """Hear one reply from its beginning to its end."""
        self._ended.clear()
        heard = Heard()
        self.heard.append(heard)
        heard.response_id = await self.connection.say(self.session_id, num_tokens, INPUT_IDS)
        await self._ended.wait()

    def _hear(self, now_s: float, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "response.output_text.delta":
            self.heard[-1].arrivals.append((now_s, event["offset"] + len(event["delta"])))
        elif kind in TERMINAL:
            self.heard[-1].ended = kind
            self._ended.set()


async def opened(num: int, open_one: Callable[[], Coroutine[Any, Any, Any]]) -> list[Any]:
    """So many of what `open_one` gives, a few at a time."""
    slots = asyncio.Semaphore(OPEN_AT_ONCE)

    async def one() -> Any:
        async with slots:
            return await open_one()

    return list(await asyncio.gather(*(one() for _ in range(num))))


async def stream(server: Server, num_readers: int, num_tokens: int) -> list[Heard | float]:
    """Readers that each hear one reply, all begun together; last the front end's processor seconds meanwhile."""

    async def one() -> Reader:
        reader = Reader()
        await reader.open(server.url)
        return reader

    readers = await opened(num_readers, one)
    before_s = server.cpu_s()["front end"]
    await asyncio.gather(*(reader.take_turn(num_tokens) for reader in readers))
    busy_s = server.cpu_s()["front end"] - before_s
    for reader in readers:
        reader.connection.close()
    return [*(heard for reader in readers for heard in reader.heard), busy_s]


def in_processes(
    num_processes: int, work: Callable[..., Coroutine[Any, Any, list[Any]]], *shares: Sequence[Any]
) -> Any:
    """Run `work` in processes of their own, with a share of the arguments each; all that they give."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(num_processes) as pool:
        given = pool.starmap(_run, [(work, *share) for share in shares])
    return [item for part in given for item in part]


def _run(work: Callable[..., Coroutine[Any, Any, list[Any]]], *arguments: Any) -> list[Any]:
    return asyncio.run(work(*arguments))


def delays_ms(heard: Sequence[Heard], trace: Path) -> np.ndarray:
    """Milliseconds from each token's making to its arrival, by the double's own trace [tokens].

    Of those made once all had begun and `SETTLE_S` had passed: so many beginnings at once are another matter.
    """
    steps, first_step = _read_trace(trace)
    since_s = max(response.arrivals[0][0] for response in heard) + SETTLE_S
    parts = [np.zeros(0)]
    for response in heard:
        made_s = steps[first_step[response.response_id] :]
        before = 0
        for at_s, letters in response.arrivals:
            made = made_s[before:letters]
            parts.append((at_s - made[made > since_s]) * 1000)
            before = letters
    return np.concatenate(parts)


def _read_trace(trace: Path) -> tuple[np.ndarray, dict[str, int]]:
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    first_step = {line["response_id"]: line["first_step"] for line in lines if "response_id" in line}
    steps = np.array([at_s for line in lines for at_s in line.get("steps", ())])
    return steps, first_step
