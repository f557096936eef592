"""Client processes: sessions split over them, all begun at once, their turns collected.

Several processes, because one Python client cannot take the tokens of a GPU.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from typing import Any

from load.over_completions import CompletionSession
from load.over_ws import WsConnection, WsSession
from load.turns import Turn
from load.workloads import Workload

SESSIONS_PER_CONNECTION = 16
START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be run against which server; `seed` also keeps runs from sharing their prefixes."""

    url: str
    api_key: str | None
    via: str
    workload: Workload
    seed: str
    vocab_size: int


def default_processes() -> int:
    """As many as leave the server some cores."""
    return max(1, min(16, (os.cpu_count() or 1) - 4))


def run_clients(task: Task, num_processes: int) -> list[Turn]:
    """Every turn of the workload, in no order. Sessions that fail end with a turn that says why."""
    context = multiprocessing.get_context("spawn")
    shares = [list(range(task.workload.sessions))[first::num_processes] for first in range(num_processes)]
    shares = [share for share in shares if share]
    barrier, results = context.Barrier(len(shares)), context.SimpleQueue()
    processes = [context.Process(target=run_share, args=(task, share, barrier, results)) for share in shares]
    for process in processes:
        process.start()
    turns = [turn for _ in processes for turn in results.get()]
    for process in processes:
        process.join()
    return turns


def run_share(task: Task, sessions: list[int], barrier: Barrier, results: SimpleQueue[list[Turn]]) -> None:
    """One process's sessions; gives an answer whatever happens to them."""
    turns: list[Turn] = []
    try:
        asyncio.run(_run(task, sessions, barrier, turns))
    except Exception as error:  # noqa: BLE001 - a benchmark reports what went wrong and goes on
        turns.append(_failed(sessions[0], 0, error))
        barrier.abort()
    results.put(turns)


async def _run(task: Task, sessions: list[int], barrier: Barrier, turns: list[Turn]) -> None:
    connections = _connections(task, len(sessions))
    speakers = [_speaker(task, connections, index, session) for index, session in enumerate(sessions)]
    for connection in connections:
        await connection.open()
    for speaker in speakers:
        await speaker.open()
    barrier.wait(START_TIMEOUT_S)
    await asyncio.gather(*(_talk(task, *pair, turns) for pair in zip(speakers, sessions, strict=True)))
    for open_end in (*speakers, *connections):
        await open_end.close()


def _connections(task: Task, num_sessions: int) -> list[WsConnection]:
    if task.via != "ws":
        return []
    return [WsConnection(task.url, task.api_key) for _ in range(0, num_sessions, SESSIONS_PER_CONNECTION)]


def _speaker(task: Task, connections: list[WsConnection], index: int, session: int) -> Any:
    if connections:
        return WsSession(connections[index // SESSIONS_PER_CONNECTION], session)
    return CompletionSession(task.url, task.api_key, session)


async def _talk(task: Task, speaker: Any, session: int, turns: list[Turn]) -> None:
    for number in range(task.workload.turns):
        if number and task.workload.think_s:
            await asyncio.sleep(task.workload.think_s)
        ids = task.workload.input_ids(session, number, seed=task.seed, vocab_size=task.vocab_size)
        try:
            turns.append(await speaker.take_turn(number, ids, task.workload.output_tokens))
        except Exception as error:  # noqa: BLE001 - this session ends here, the others go on
            turns.append(_failed(session, number, error))
            return


def _failed(session: int, number: int, error: Exception) -> Turn:
    return Turn(session, number, time.perf_counter(), error=f"{type(error).__name__}: {error}"[:300])
