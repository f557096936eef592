"""Background tasks that are not forgotten: held while they run, their faults logged, all ended together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from chatserve.errors import ServiceError

T = TypeVar("T")
logger = logging.getLogger(__name__)


class TaskGroup:
    """Owns tasks that outlive whoever started them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run work in a task; a fault that is no refusal is logged."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def carry_out(self, work: Coroutine[Any, Any, T], name: str) -> T:
        """Run work to its end and give its result, also where the caller is cancelled meanwhile."""
        return await asyncio.shield(self.spawn(work, name))

    async def close(self) -> None:
        """Cancel what still runs and wait for it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        fault = None if task.cancelled() else task.exception()
        if fault is not None and not isinstance(fault, ServiceError):
            logger.error("%s failed", task.get_name(), exc_info=fault)
