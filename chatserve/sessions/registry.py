"""The sessions in memory: loaded when asked for, kept while somebody uses them, the idle ones bounded."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from chatserve.errors import NotFound, ServiceError, Unavailable
from chatserve.sessions.limits import SessionLimits
from chatserve.sessions.ports import Store
from chatserve.sessions.recovery import load_messages
from chatserve.sessions.session import LiveSession
from chatserve.storage.session_store import FenceLost, SessionMeta

DRAIN_RETRY_MS = 1000


class SessionRegistry:
    """One `LiveSession` for each session in use. `on_loaded` is told of each that comes into memory."""

    def __init__(
        self,
        store: Store,
        limits: SessionLimits,
        clock: Callable[[], float],
        on_loaded: Callable[[LiveSession], None],
    ) -> None:
        self._store = store
        self._limits = limits
        self._clock = clock
        self._on_loaded = on_loaded
        self._live: dict[str, LiveSession] = {}
        self._idle: OrderedDict[str, LiveSession] = OrderedDict()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._is_closed = False

    def __iter__(self) -> Iterator[LiveSession]:
        return iter(list(self._live.values()))

    def __len__(self) -> int:
        return len(self._live)

    def close(self) -> None:
        """Take no further session from whoever may write it: this process is about to end."""
        self._is_closed = True

    def drop(self, live: LiveSession, reason: ServiceError) -> None:
        """Take a session out of use: it was deleted, or another server has it."""
        live.retire(reason)
        if self._live.get(live.id) is live:
            del self._live[live.id]
            self._idle.pop(live.id, None)

    @contextmanager
    def using(self, live: LiveSession) -> Iterator[None]:
        """Keep this session in memory meanwhile."""
        live.num_users += 1
        self._idle.pop(live.id, None)
        try:
            yield
        finally:
            live.num_users -= 1
            if not live.num_users and self._live.get(live.id) is live:
                self._idle[live.id] = live
                self._forget_idle()

    @asynccontextmanager
    async def use(self, session_id: str, tenant: str | None = None) -> AsyncIterator[LiveSession]:
        """A session that this process may write, kept in memory meanwhile.

        Raises NotFound for no such session of this tenant (None is any), Unavailable where it would have to be taken
        over after `close`.
        """
        while (live := self._live.get(session_id)) is None:
            await self._load(session_id)  # the loop: it may be gone again before this task's turn comes
        _check_tenant(live.meta, tenant)
        with self.using(live):
            yield live

    @asynccontextmanager
    async def view(self, session_id: str, tenant: str) -> AsyncIterator[LiveSession]:
        """As `use`, for reading only: a session that is not in memory is read, and whoever may write it still may."""
        if session_id in self._live or session_id in self._loading:
            async with self.use(session_id, tenant) as live:
                yield live
            return
        meta = await self._store.load_meta(session_id)
        if meta is None:
            raise _no_session(session_id)
        _check_tenant(meta, tenant)
        messages = await load_messages(self._store, meta, self._limits)
        if meta.num_messages and not messages:  # deleted between the two
            raise _no_session(session_id)
        live = LiveSession(self._store, meta, messages, self._limits, self._clock)
        live.retire(FenceLost(f"session {session_id!r} was read only"))
        yield live

    async def _load(self, session_id: str) -> None:
        """Load once, however many ask at the same time."""
        task = self._loading.get(session_id)
        if task is None and self._is_closed:
            raise draining()
        if task is None:
            task = self._loading[session_id] = asyncio.create_task(self._load_now(session_id))
            task.add_done_callback(lambda done: self._loaded(session_id, done))
        await asyncio.shield(task)

    def _loaded(self, session_id: str, task: asyncio.Task[None]) -> None:
        del self._loading[session_id]
        if not task.cancelled():
            task.exception()  # seen, also where whoever asked has gone

    async def _load_now(self, session_id: str) -> None:
        meta = await self._store.take_fence(session_id)
        messages = await load_messages(self._store, meta, self._limits)
        live = LiveSession(self._store, meta, messages, self._limits, self._clock)
        self._live[live.id] = live
        with self.using(live):
            self._on_loaded(live)

    def _forget_idle(self) -> None:
        while len(self._idle) > self._limits.max_idle_sessions:
            session_id, live = self._idle.popitem(last=False)
            del self._live[session_id]
            live.retire(FenceLost(f"session {session_id!r} left memory; send this again"))


def _check_tenant(meta: SessionMeta, tenant: str | None) -> None:
    if tenant is not None and meta.tenant != tenant:
        raise _no_session(meta.id)


def _no_session(session_id: str) -> NotFound:
    return NotFound(f"there is no session {session_id!r}", param="session_id")


def draining() -> Unavailable:
    """The refusal of what a server on its way out begins no more."""
    return Unavailable(
        "the server is shutting down; send this again in a moment",
        code="server_draining",
        retry_after_ms=DRAIN_RETRY_MS,
    )
