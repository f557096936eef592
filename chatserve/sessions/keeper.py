"""Keeps responses running: starts turns, takes up those that were interrupted, ends them with the process.

A session whose last write is open, or that has a response nobody makes, is mended here in the background.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack

from chatserve.errors import NotFound
from chatserve.sessions.plan import TurnPlan
from chatserve.sessions.registry import SessionRegistry
from chatserve.sessions.session import LiveSession
from chatserve.sessions.tasks import TaskGroup
from chatserve.sessions.turn import Turn, TurnTools
from chatserve.storage.session_store import FenceLost, StorageUnavailable


class TurnKeeper:
    """Owns every running turn. `on_finished` is told of each session whose response came to its terminal event."""

    def __init__(
        self,
        tools: TurnTools,
        registry: SessionRegistry,
        tasks: TaskGroup,
        on_finished: Callable[[LiveSession], None],
    ) -> None:
        self._tools = tools
        self._registry = registry
        self._tasks = tasks
        self._on_finished = on_finished
        self._running: set[Turn] = set()
        self._mending: set[str] = set()
        self._is_open = True

    @property
    def is_open(self) -> bool:
        """Whether turns may begin."""
        return self._is_open

    @property
    def num_running(self) -> int:
        """Responses being made."""
        return len(self._running)

    def start(self, live: LiveSession, turn: Turn) -> None:
        """Make a response that is in the log."""
        pin = ExitStack()
        pin.enter_context(self._registry.using(live))
        live.turn = turn
        self._running.add(turn)
        turn.start(lambda: self._ended(live, turn, pin))
        if live.cancel_at_start == turn.response_id:
            turn.stop()

    def mend(self, live: LiveSession, delay_s: float = 0.0) -> None:
        """Settle what is open in a session and go on with its response, as soon as the store allows."""
        if self._is_open and live.id not in self._mending:
            self._mending.add(live.id)
            pin = ExitStack()
            pin.enter_context(self._registry.using(live))  # from now on: before the task begins it could leave memory
            self._tasks.spawn(self._mend(live, delay_s, pin), name=f"mend-{live.id}")

    async def drain(self, timeout_s: float) -> None:
        """Begin nothing more; wait for what runs, then leave it to whoever has the sessions next."""
        self._is_open = False
        ends = [asyncio.create_task(turn.wait_done()) for turn in self._running]
        if ends:
            await asyncio.wait(ends, timeout=timeout_s)
        for turn in list(self._running):
            turn.abandon()
        await asyncio.gather(*ends)

    def _ended(self, live: LiveSession, turn: Turn, pin: ExitStack) -> None:
        self._running.discard(turn)
        if live.turn is turn:  # the next one may have begun as soon as the terminal event was seen
            live.turn = None
        if turn.finished:
            self._on_finished(live)
        if live.turn is None and (live.meta.active is not None or not turn.finished):
            self.mend(live, 0.0 if turn.finished else self._tools.limits.requeue_delay_s)
        pin.close()

    async def _mend(self, live: LiveSession, delay_s: float, pin: ExitStack) -> None:
        try:
            with pin:
                await asyncio.sleep(delay_s)
                while await self._settled(live):
                    await self._go_on(live)
                    if live.turn is not None or not live.in_doubt:
                        break  # else a command got stuck meanwhile, and found this task at work already
        finally:
            self._mending.discard(live.id)

    async def _settled(self, live: LiveSession) -> bool:
        """Whether the session is still ours once its last write is certain."""
        while True:
            try:
                await live.settle()
            except StorageUnavailable:
                await asyncio.sleep(self._tools.limits.store_retry_s)
            except (FenceLost, NotFound) as reason:
                self._registry.drop(live, reason)
                live.tail.end(reason)
                if live.turn is not None:
                    live.turn.abandon()
                return False
            else:
                return True

    async def _go_on(self, live: LiveSession) -> None:
        async with live.lock:
            if live.meta.active is not None and live.turn is None and self._is_open:
                self.start(live, Turn(live, TurnPlan.from_map(live.meta.active), None, self._tools))
