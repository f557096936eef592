"""Sends commits to Redis: those that are waiting together go in one pipeline, in the order in which they came.

Under load the batches grow by themselves, because new commits collect while a pipeline is on its way. Knows nothing
about what a commit says.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from chatserve.storage.health import Health, StorageUnavailable, is_away
from chatserve.storage.scripts import Script


@dataclass(frozen=True, slots=True)
class _Commit:
    keys: Sequence[bytes]
    payload: bytes
    answer: asyncio.Future[Any]


class CommitWriter:
    """Runs one Lua script for many callers. A call whose outcome is unknown raises `StorageUnavailable`."""

    def __init__(
        self,
        redis: Redis,
        script: Script,
        health: Health,
        *,
        max_waiting: int = 4096,
        max_waiting_bytes: int = 64 << 20,
        max_batch: int = 256,
    ) -> None:
        self._redis = redis
        self._script = script
        self._health = health
        self._max_waiting = max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        self._max_batch = max_batch
        self._waiting: deque[_Commit] = deque()
        self._waiting_bytes = 0
        self._flushing: asyncio.Task[None] | None = None

    async def run(self, keys: Sequence[bytes], payload: bytes) -> Any:
        """The script's answer. Raises `StorageUnavailable` also when too much is waiting already."""
        self._health.check()
        self._check_room(len(payload))
        commit = _Commit(keys, payload, asyncio.get_running_loop().create_future())
        self._waiting.append(commit)
        self._waiting_bytes += len(payload)
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())
        return await commit.answer

    async def close(self) -> None:
        """Wait for what was handed in."""
        if self._flushing is not None:
            await asyncio.gather(self._flushing, return_exceptions=True)

    def _check_room(self, num_bytes: int) -> None:
        if len(self._waiting) >= self._max_waiting or self._waiting_bytes + num_bytes > self._max_waiting_bytes:
            raise StorageUnavailable(
                f"{len(self._waiting)} writes of {self._waiting_bytes} bytes are waiting for Redis already; try again",
                retry_after_ms=1000,
            )

    async def _flush(self) -> None:
        try:
            while self._waiting:
                await self._send(self._next_batch())
                if not self._health.available:
                    self._fail_waiting()
        finally:
            self._flushing = None

    def _fail_waiting(self) -> None:
        """What waits behind a lost batch is lost too: sent now, it would meet a log without its predecessors."""
        while batch := self._next_batch():
            for commit in batch:
                commit.answer.set_exception(self._health.unavailable())

    def _next_batch(self) -> list[_Commit]:
        """The oldest commits whose callers are still there."""
        batch: list[_Commit] = []
        while self._waiting and len(batch) < self._max_batch:
            commit = self._waiting.popleft()
            self._waiting_bytes -= len(commit.payload)
            if not commit.answer.done():
                batch.append(commit)
        return batch

    async def _send(self, batch: list[_Commit]) -> None:
        try:
            answers = await self._answers(batch)
        except (RedisError, OSError) as error:
            answers = [error] * len(batch)
        except asyncio.CancelledError:
            for commit in batch:
                commit.answer.cancel()
            raise
        for commit, answer in zip(batch, answers, strict=True):
            self._deliver(commit.answer, answer)

    def _deliver(self, future: asyncio.Future[Any], answer: Any) -> None:
        if future.done():
            return
        if not isinstance(answer, Exception):
            future.set_result(answer)
        else:
            future.set_exception(self._health.lost(answer) if is_away(answer) else answer)

    async def _answers(self, batch: list[_Commit]) -> list[Any]:
        """One answer or exception for each commit; the script is loaded when Redis does not have it (any more)."""
        answers = await self._pipeline(batch)
        unknown = [index for index, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if unknown:
            await self._redis.script_load(self._script.source)
            again = await self._pipeline([batch[index] for index in unknown])
            for index, answer in zip(unknown, again, strict=True):
                answers[index] = answer
        return answers

    async def _pipeline(self, batch: list[_Commit]) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for commit in batch:
            pipeline.execute_command("EVALSHA", self._script.sha, len(commit.keys), *commit.keys, commit.payload)
        return list(await pipeline.execute(raise_on_error=False))
