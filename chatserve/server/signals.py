"""SIGTERM and SIGINT for one server process: the first asks for an orderly end, the second for an end at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Catches the signals from its making on. Until `loaded` is called, the first one cancels the task that made it."""

    def __init__(self) -> None:
        self._loading: asyncio.Task[Any] | None = asyncio.current_task()
        self._requested = asyncio.Event()
        self._forced = asyncio.Event()
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self.receive)

    def receive(self) -> None:
        """A signal has arrived."""
        if self._requested.is_set():
            self._forced.set()
        self._requested.set()
        if self._loading is not None:
            self._loading.cancel()

    def loaded(self) -> None:
        """From now on a signal is something to wait for."""
        self._loading = None

    async def requested(self) -> None:
        """Wait for the first signal."""
        await self._requested.wait()

    async def unless_forced(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work, or leave it where it is when the second signal comes."""
        task = asyncio.ensure_future(work)
        forced = asyncio.ensure_future(self._forced.wait())
        await asyncio.wait({task, forced}, return_when=asyncio.FIRST_COMPLETED)
        for one in (task, forced):
            one.cancel()
        await asyncio.gather(task, forced, return_exceptions=True)
