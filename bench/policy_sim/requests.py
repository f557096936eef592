"""What is replayed: requests read from a trace, whose sessions are inferred from shared beginnings, or made up here.

A request's history is given in blocks of 512 tokens, each named by a number that stands for it and all before it.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 512
START_S = 1.0  # no request at zero, which a record takes for a time that is not known


@dataclass(frozen=True, slots=True)
class Request:
    """One turn: its time in seconds, the complete blocks of its input, the input's tokens, and whose turn it is."""

    time_s: float
    blocks: tuple[int, ...]
    num_tokens: int
    session_id: str


def read_trace(path: Path) -> list[Request]:
    """A trace in Mooncake's format: JSON lines with `timestamp` (ms), `input_length` and `hash_ids`; gzip or plain."""
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    blocks = [tuple(row["hash_ids"][: row["input_length"] // BLOCK_TOKENS]) for row in rows]
    return [
        Request(START_S + row["timestamp"] / 1000, path, row["input_length"], session_id)
        for row, path, session_id in zip(rows, blocks, infer_sessions(blocks), strict=True)
    ]


def infer_sessions(paths: Sequence[tuple[int, ...]]) -> Iterator[str]:
    """A session for each history: that of the one it continues, or a new one.

    It continues a session when all of that one's latest complete blocks, and more than the one block that everybody
    begins with, stand at its beginning. A history that leaves an older one in its middle is a session of its own.
    """
    writers: dict[int, str] = {}
    ends: dict[str, int] = {}
    for number, path in enumerate(paths):
        known = next((place for place, block in enumerate(path) if block not in writers), len(path))
        writer = writers[path[known - 1]] if known > 1 else ""
        session_id = writer if known > 1 and ends[writer] == path[known - 1] else f"session-{number}"
        writers |= dict.fromkeys(path[known:], session_id)
        ends[session_id] = path[-1] if path else -1
        yield session_id


@dataclass(frozen=True)
class Chat:
    """Sessions of people who think for a while between turns: some quick, some slow, and few of them for hours."""

    duration_s: float = 3600.0
    sessions_per_s: float = 0.5
    system_blocks: int = 4
    first_blocks: float = 6.0  # mean of a session's first message
    turn_blocks: float = 2.0
    pace_s: float = 90.0  # median pause of the median person
    goes_on: Callable[[int, float], float] = lambda turns, time_s: 1.0 - 0.6 / turns**0.5


def make_chat(chat: Chat, seed: int = 1) -> list[Request]:
    """Requests of all sessions in the order of their times. Whether a turn follows is drawn by `goes_on`."""
    lots, blocks = random.Random(seed), count(chat.system_blocks)
    requests: list[Request] = []
    start_s = START_S
    for number in count():
        start_s += lots.expovariate(chat.sessions_per_s)
        if start_s > chat.duration_s:
            break
        requests += _session(chat, lots, blocks, start_s, f"chat-{number}")
    return sorted(requests, key=lambda request: request.time_s)


def make_scan(seed: int = 2, *, every_s: float = 1.0, num_blocks: int = 24) -> list[Request]:
    """The chat, and beside it documents that are read once: several times as many blocks, none used again."""
    chat, blocks = make_chat(Chat(sessions_per_s=0.2), seed), count(10**6)
    reads = [
        Request(
            every_s * number, (0, 1, *(next(blocks) for _ in range(num_blocks))), num_blocks * 512, f"read-{number}"
        )
        for number in range(int(chat[-1].time_s / every_s))
    ]
    return sorted([*chat, *reads], key=lambda request: request.time_s)


def make_shift(seed: int = 3) -> list[Request]:
    """A chat whose habits turn round in the middle: first long sessions go on, then only short ones do."""

    def goes_on(turns: int, time_s: float) -> float:
        early = time_s < Chat.duration_s / 2
        return (0.3 if turns == 1 else 0.9) if early else (0.9 if turns < 3 else 0.05)

    return make_chat(Chat(goes_on=goes_on), seed)


def _session(chat: Chat, lots: random.Random, blocks: Iterator[int], start_s: float, session_id: str) -> list[Request]:
    requests: list[Request] = []
    path, time_s = tuple(range(chat.system_blocks)), start_s
    pace_s = lots.lognormvariate(math.log(chat.pace_s), 0.8)
    mean_blocks = chat.first_blocks
    while time_s < chat.duration_s:
        path += tuple(next(blocks) for _ in range(1 + int(lots.expovariate(1 / mean_blocks))))
        requests.append(Request(time_s, path, len(path) * BLOCK_TOKENS, session_id))
        if lots.random() > chat.goes_on(len(requests), time_s):
            break
        time_s += pace_s * lots.lognormvariate(0.0, 1.0)
        mean_blocks = chat.turn_blocks
    return requests
