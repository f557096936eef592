"""The front end's side of the engine: starts it, feeds it, replaces it when it dies.

A request outlives one death of the engine: it is submitted again with the tokens reported so far. It knows no
sessions beyond their ids and no tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from array import array
from collections.abc import AsyncIterator, Sequence
from typing import Any

from chatserve.engine.api import (
    EngineInfo,
    Finished,
    Forgotten,
    GenerationRequest,
    Held,
    Progress,
    Resumed,
    Started,
    Tokens,
)
from chatserve.engine.child import EngineChild
from chatserve.engine.config import EngineConfig
from chatserve.engine.history import history_hash
from chatserve.engine.pacing import Pacing
from chatserve.engine.wire import ChannelClosed
from chatserve.errors import BadRequest, Overloaded, ServiceError, Unavailable

STALL_TIMEOUT_S = 30.0
MAX_DEATHS = 2
RESTART_DELAYS_S = (0.0, 0.5, 2.0, 5.0, 10.0)
RETRY_AFTER_MS = 1000
MAX_TO_FORGET = 256  # sessions deleted while no engine is there
FORGET_TIMEOUT_S = 5.0
FORGET_POLL_S = 0.005
logger = logging.getLogger(__name__)


class _Stream:
    """What one running request still has to tell its reader, and what a fresh engine would need to go on with it."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.generated: list[int] = []
        self.deaths = 0
        self.started = False
        self.cancelled = False
        self._pending: list[Progress | ServiceError] = []
        self._wake = asyncio.Event()

    def put(self, item: Progress | ServiceError) -> None:
        self._pending.append(item)
        self._wake.set()

    def put_tokens(self, token_ids: list[int], pacing: Pacing) -> None:
        self.generated += token_ids
        last = self._pending[-1] if self._pending else None
        if isinstance(last, Tokens):
            last.token_ids.extend(token_ids)
        else:
            self._pending.append(Tokens(list(token_ids)))
        if not self._wake.is_set():
            pacing.wake(self, self._wake.set)

    async def take(self) -> list[Progress | ServiceError]:
        await self._wake.wait()
        self._wake.clear()
        items, self._pending = self._pending, []
        return items


class EngineClient:
    """A supervised engine; implements `chatserve.engine.api.Engine`.

    `start` raises StartupError when the model cannot be loaded. After a death `ready` is False until the next engine
    has loaded; requests in flight wait for it, and fail with `server_interrupted` at the second death.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._child: EngineChild | None = None
        self._info: EngineInfo | None = None
        self._records_url: str | None = None
        self._to_forget: dict[str, dict[str, Any]] = {}  # until it is known to be gone: on disk it outlives an engine
        self._streams: dict[str, _Stream] = {}
        self._pacing = Pacing()
        self._queries: dict[int, asyncio.Future[Any]] = {}
        self._query_ids = itertools.count(1)
        self._supervisor: asyncio.Task[None] | None = None
        self._last_message_s = 0.0

    @property
    def info(self) -> EngineInfo:
        """What the engine reported when it was first ready; raises Unavailable before that."""
        if self._info is None:
            raise Unavailable("the engine has not started yet", code="server_interrupted")
        return self._info

    @property
    def ready(self) -> bool:
        """Whether an engine is loaded and listening."""
        return self._child is not None

    @property
    def pid(self) -> int | None:
        """The engine's process id while one is ready."""
        return self._child.pid if self._child else None

    async def start(self) -> EngineInfo:
        """Load the first engine and begin to supervise it."""
        self._child = await EngineChild.spawn(self._config)
        self._info = self._child.info
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")
        return self._child.info

    async def close(self) -> None:
        """End the engine; requests still running fail with `server_interrupted`."""
        if self._supervisor:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        child, self._child = self._child, None
        if child:
            await child.close()
        for stream in self._streams.values():
            stream.put(_interrupted())

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Progress]:
        """See `chatserve.engine.api.Engine.generate`."""
        stream = self._streams[request.request_id] = _Stream(request)
        self._submit(stream, whole=False)
        ended = False
        try:
            while not ended:
                for item in await stream.take():
                    if isinstance(item, ServiceError):
                        raise item
                    ended = isinstance(item, Finished)
                    yield item
        finally:
            del self._streams[request.request_id]
            self._pacing.forget(stream)
            if not ended:
                self._post({"verb": "cancel", "request_id": request.request_id})

    def cancel(self, request_id: str) -> None:
        """See `chatserve.engine.api.Engine.cancel`; unknown ids are ignored, the request may just have ended."""
        stream = self._streams.get(request_id)
        if stream is None:
            return
        stream.cancelled = True
        if self.ready:
            self._post({"verb": "cancel", "request_id": request_id})
        else:
            stream.put(Finished("cancelled", 0.0))

    def read_records(self, redis_url: str) -> None:
        """Have this engine, and those that replace it, evict by the session records in that Redis."""
        self._records_url = redis_url
        self._post({"verb": "read_records", "url": redis_url})

    def forget_session(self, session_id: str) -> None:
        """See `chatserve.engine.api.Engine.forget_session`."""
        self._post(_forget(session_id, "", ()))

    async def delete_session(self, session_id: str, tenant: str, histories: Sequence[Forgotten]) -> None:
        """See `chatserve.engine.api.Engine.delete_session`."""
        command = self._to_forget[session_id] = _forget(session_id, tenant, histories)
        while len(self._to_forget) > MAX_TO_FORGET:
            self._to_forget.pop(next(iter(self._to_forget)))
        self._post(command)
        with contextlib.suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(FORGET_TIMEOUT_S):
                while await self._query({"what": "is_forgetting"}) is True:  # noqa: ASYNC110 - of another process
                    await asyncio.sleep(FORGET_POLL_S)
            self._to_forget.pop(session_id, None)

    def warm_session(self, session_id: str, tenant: str, token_ids: Sequence[int]) -> None:
        """See `chatserve.engine.api.Engine.warm_session`."""
        if self._info is not None and self._info.has_tiers:
            self._post({"verb": "warm", **_history(session_id, tenant, token_ids)})

    async def cached_tokens(self, session_id: str, tenant: str, token_ids: Sequence[int]) -> Held:
        """See `chatserve.engine.api.Engine.cached_tokens`; nothing is held while no engine is ready."""
        if not self.ready:
            return Held({"device": 0})
        return Held(**await self._query({"what": "cached_tokens", **_history(session_id, tenant, token_ids)}))

    async def stats(self) -> dict[str, Any]:
        """See `chatserve.engine.api.Engine.stats`."""
        stats: dict[str, Any] = await self._query({"what": "stats"})
        return stats

    async def integrity_fault(self) -> str | None:
        """Have the engine check its store's books; None when they are right, else what contradicts what."""
        fault: str | None = await self._query({"what": "check_integrity"})
        return fault

    async def _query(self, fields: dict[str, Any]) -> Any:
        if not self.ready:
            raise _interrupted()
        query_id = next(self._query_ids)
        future = self._queries[query_id] = asyncio.get_running_loop().create_future()
        self._post({"verb": "query", "query_id": query_id, **fields})
        try:
            return await asyncio.wait_for(future, STALL_TIMEOUT_S)
        finally:
            del self._queries[query_id]

    def _post(self, command: dict[str, Any]) -> None:
        if self._child:  # else nobody needs it: the next engine is given every unfinished request
            self._child.channel.post(command)

    def _submit(self, stream: _Stream, *, whole: bool) -> None:
        """Send a request; unless `whole`, only the ids past the history the engine should already hold."""
        request = stream.request
        num_sent_before = 0 if whole else request.num_history
        ids = array("i", request.token_ids)
        ids.extend(stream.generated)
        self._post(
            {
                "verb": "submit",
                "request_id": request.request_id,
                "session_id": request.session_id,
                "tenant": request.tenant,
                "num_history": request.num_history,
                "history_hash": history_hash(ids[: request.num_history]),
                "num_history_sent": num_sent_before,
                "token_ids": ids[num_sent_before:].tobytes(),
                "num_generated": request.num_generated + len(stream.generated),
                "num_computed": request.num_computed,
                "max_output_tokens": request.max_output_tokens,
                "sampling": request.sampling.as_map(),
                "stop_token_ids": list(request.stop_token_ids),
                "reuse": request.reuse,
            }
        )

    async def _supervise(self) -> None:
        """Read the engine's messages; when it dies or stalls, replace it and go on with what was running."""
        while True:
            child = self._child
            assert child is not None
            self._last_message_s = asyncio.get_running_loop().time()
            watchdog = asyncio.create_task(self._watch(child), name="engine-watchdog")
            try:
                await self._read(child)
            except ChannelClosed:
                logger.error("the engine (pid %d) ended %s; starting another", child.pid, child.describe_end())
            finally:
                watchdog.cancel()
            self._child = None
            await child.close()
            self._after_death()
            self._child = await self._respawn()
            if self._records_url is not None:
                self.read_records(self._records_url)
            for command in self._to_forget.values():
                self._post(command)
            self._to_forget.clear()
            for stream in list(self._streams.values()):
                self._continue(stream)

    async def _read(self, child: EngineChild) -> None:
        loop = asyncio.get_running_loop()
        while True:
            events = await child.channel.receive()
            self._last_message_s = loop.time()
            for event in events:
                self._dispatch(event)

    async def _watch(self, child: EngineChild) -> None:
        """Kill an engine that sends no message for `STALL_TIMEOUT_S` while requests run."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(STALL_TIMEOUT_S / 10)
            if not self._streams:
                self._last_message_s = loop.time()
            elif loop.time() - self._last_message_s > STALL_TIMEOUT_S:
                logger.error("the engine (pid %d) sent nothing for %.0f s; killing it", child.pid, STALL_TIMEOUT_S)
                child.kill()
                return

    async def _respawn(self) -> EngineChild:
        for attempt in itertools.count():
            await asyncio.sleep(RESTART_DELAYS_S[min(attempt, len(RESTART_DELAYS_S) - 1)])
            try:
                return await EngineChild.spawn(self._config)
            except Exception:  # whatever keeps it from starting, trying again later is all that helps
                logger.exception("the engine could not be started again; next attempt follows")
        raise AssertionError("unreachable: count() does not end")

    def _after_death(self) -> None:
        for future in self._queries.values():
            if not future.done():
                future.set_exception(_interrupted())
        for stream in self._streams.values():
            stream.deaths += 1
            if stream.deaths >= MAX_DEATHS:
                stream.put(_interrupted())
            elif stream.cancelled:
                stream.put(Finished("cancelled", 0.0))

    def _continue(self, stream: _Stream) -> None:
        if stream.cancelled or stream.deaths >= MAX_DEATHS:
            return
        if stream.started:
            stream.put(Resumed())
        self._submit(stream, whole=True)

    def _dispatch(self, event: list[Any]) -> None:
        kind, key, *fields = event
        if kind == "reply":
            future = self._queries.get(key)
            if future and not future.done():
                future.set_result(fields[0])
            return
        stream = self._streams.get(key)
        if stream is None:
            return  # its reader has gone; the cancel is under way
        if kind == "need_tokens":
            self._submit(stream, whole=True)
        elif kind == "started":
            self._started(stream, fields)
        elif kind == "tokens":
            stream.put_tokens(fields[0], self._pacing)
        elif kind == "refused":
            stream.put(_refusal(*fields))
        else:
            stream.put(Finished(*fields))

    def _started(self, stream: _Stream, fields: list[Any]) -> None:
        if not stream.started:  # a continued request has told its reader already
            stream.started = True
            stream.put(Started(*fields))


def _history(session_id: str, tenant: str, token_ids: Sequence[int]) -> dict[str, Any]:
    return {"session_id": session_id, "tenant": tenant, "token_ids": array("i", token_ids).tobytes()}


def _interrupted() -> Unavailable:
    return Unavailable(
        "the engine stopped while this was running; try again", code="server_interrupted", retry_after_ms=RETRY_AFTER_MS
    )


def _refusal(code: str, message: str) -> ServiceError:
    if code == "queue_full":
        return Overloaded(message, retry_after_ms=RETRY_AFTER_MS)
    return BadRequest(message, code=code)


def _forget(session_id: str, tenant: str, histories: Sequence[Forgotten]) -> dict[str, Any]:
    packed = [[array("i", history.token_ids).tobytes(), history.num_kept] for history in histories]
    return {"verb": "forget", "session_id": session_id, "tenant": tenant, "histories": packed}
