"""An engine whose replies follow from the prompt, and a store that can be away, cut off or slow to admit success."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from chatserve.engine.api import EngineInfo, Finished, Forgotten, GenerationRequest, Held, Progress, Started, Tokens
from chatserve.storage.session_store import SessionStore, StorageUnavailable


class FakeEngine:
    """Samples by `choose(token_ids)`; a session's tokens stay cached until `held` forgets them.

    With `gated`, every token waits for `allow`, else for `pace_s`. `failure` is raised where the next token would come.
    """

    def __init__(
        self,
        choose: Callable[[Sequence[int]], int],
        *,
        max_context: int = 4096,
        gated: bool = False,
        pace_s: float = 0.0,
    ) -> None:
        self.info = EngineInfo("fake", max_context, 512, max_context, 65536, 64, "cpu", "float32", "none")
        self.ready = True
        self.requests: list[GenerationRequest] = []
        self.held: dict[str, list[int]] = {}
        self.failure: BaseException | None = None
        self.extra: list[Progress] = []
        self.forgotten: list[tuple[list[int], int]] = []
        self.warmed: list[tuple[str, str, list[int]]] = []
        self.deaf = False
        self._choose = choose
        self._pace_s = pace_s
        self._cancelled: set[str] = set()
        self._allowed = asyncio.Semaphore(0) if gated else None

    def allow(self, num_tokens: int = 1) -> None:
        assert self._allowed is not None
        for _ in range(num_tokens):
            self._allowed.release()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Progress]:
        self.requests.append(request)
        ids = list(request.token_ids)
        known = self.held.get(request.session_id, [])
        same = next((i for i, pair in enumerate(zip(known, ids)) if pair[0] != pair[1]), min(len(known), len(ids)))  # noqa: B905 - either may be longer
        reason = "evicted" if same < request.num_computed - 1 else None
        yield Started({"device": max(0, min(same, len(ids) - 1))}, 1.0, 0.0, 2.0, reason)
        self.held[request.session_id] = ids[:-1]
        num_prompt = len(ids) - request.num_generated
        limit = min(num_prompt + request.max_output_tokens, self.info.max_context)
        while True:
            await self._permission(request.request_id)
            if request.request_id in self._cancelled and not self.deaf:
                yield Finished("cancelled", 1.0)
                return
            if self.failure is not None:
                raise self.failure
            if self.extra:
                yield self.extra.pop()
            if len(ids) > num_prompt and ids[-1] in request.stop_token_ids:
                yield Finished("stop", 1.0)
                return
            if len(ids) >= limit:
                yield Finished("max_output_tokens", 1.0)
                return
            ids.append(self._choose(ids))
            self.held[request.session_id] = ids[:-1]
            yield Tokens([ids[-1]])

    async def _permission(self, request_id: str) -> None:
        if self._allowed is None or request_id in self._cancelled:
            await asyncio.sleep(self._pace_s)
        else:
            await self._allowed.acquire()

    def cancel(self, request_id: str) -> None:
        self._cancelled.add(request_id)
        if self._allowed is not None:
            self._allowed.release()

    def forget_session(self, session_id: str) -> None:
        self.held.pop(session_id, None)

    async def delete_session(self, session_id: str, tenant: str, histories: Sequence[Forgotten]) -> None:
        self.held.pop(session_id, None)
        self.forgotten += [(list(history.token_ids), history.num_kept) for history in histories]

    def warm_session(self, session_id: str, tenant: str, token_ids: Sequence[int]) -> None:
        self.warmed.append((session_id, tenant, list(token_ids)))

    async def cached_tokens(self, session_id: str, tenant: str, token_ids: Sequence[int]) -> Held:
        return Held({"device": len(self.held.get(session_id, []))})


class UnreliableStore:
    """The real store behind a line that a test can interrupt.

    `away`: every call fails. `lose_answers`: appends are carried out and fail all the same. `cut_after` events: nothing
    answers any more, as if the process had died there. `failure_rate`: this share of the calls fails before, and as
    many after, they are carried out.
    """

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self.away = False
        self.lose_answers = 0
        self.cut_after: int | None = None
        self.cut = asyncio.Event()
        self.num_appended = 0
        self.failure_rate = 0.0
        self.random = random.Random(0)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)

        async def interrupted(*args: Any, **kwargs: Any) -> Any:
            if self.cut.is_set():
                await asyncio.Event().wait()
            luck = self.random.random()
            if self.away or luck < self.failure_rate:
                raise StorageUnavailable("Redis is away")
            result = await call(*args, **kwargs)
            if self.cut.is_set():
                await asyncio.Event().wait()
            if luck > 1 - self.failure_rate:
                raise StorageUnavailable("the connection was lost")
            if name in ("append", "create"):
                await self._after_append(args[1])
            return result

        return interrupted

    async def _after_append(self, entries: Sequence[Any]) -> None:
        self.num_appended += len(entries)
        if self.cut_after is not None and self.num_appended >= self.cut_after:
            self.cut.set()
            await asyncio.Event().wait()
        if self.lose_answers:
            self.lose_answers -= 1
            raise StorageUnavailable("the connection was lost")


class FakeRecords:
    """Remembers what eviction would be told."""

    def __init__(self) -> None:
        self.touched: dict[str, dict[str, Any]] = {}

    def touch(self, session_id: str, **changes: Any) -> None:
        self.touched.setdefault(session_id, {}).update(changes)
