"""Doubles of what stands behind the server's surfaces: sessions in memory and an engine that only says what it is."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from chatserve.engine.api import EngineInfo
from chatserve.errors import BadRequest, NotFound, ServiceError
from chatserve.protocol import events
from chatserve.protocol.codec import to_wire
from chatserve.protocol.commands import ResponseCreate, SessionCreate, SessionUpdate

INFO = EngineInfo("fake-model", 4096, 512, 100_000, 65_536, 1024, "cpu", "float32", "none")


TIMINGS = {"queue_ms": 0.0, "restore_ms": 0.0, "prefill_ms": 1.0, "ttft_ms": 5.0, "decode_ms": 9.0}
TIMINGS["tokens_per_second"] = 222.0


class FakeEngine:
    """Ready, or not."""

    info = INFO
    ready = True


@dataclass
class Entry:
    """A log entry as far as the server looks at it."""

    seq: int
    wire: bytes


@dataclass
class Attached:
    """What attaching gives."""

    session_id: str
    epoch: int
    head_seq: int
    mode: events.Mode
    snapshot: dict[str, Any] | None
    after_seq: int


@dataclass
class Accepted:
    """What sending gives."""

    message_id: str | None
    response_id: str
    head_seq: int
    duplicate: bool


class FakeSessions:
    """Sessions whose reply is the input again, a word a delta. `fault` is raised by the next command."""

    def __init__(self) -> None:
        self.tenants: dict[str, str] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, list[Entry]] = {}
        self.keys: dict[str, str] = {}
        self.fault: Exception | None = None
        self.running: dict[str, dict[str, Any]] = {}
        self.typed: list[str] = []
        self.drained = False
        self._ids = itertools.count(1)
        self._grown = asyncio.Condition()

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_live(self) -> int:
        return len(self.views)

    def refusal(self, message: str) -> ServiceError:
        """A refusal to be raised as `fault`."""
        return BadRequest(message, code="context_length_exceeded")

    async def append(self, session_id: str, event: dict[str, Any]) -> int:
        log = self.logs[session_id]
        async with self._grown:
            log.append(Entry(len(log) + 1, to_wire(events.stamp(event, session_id, len(log) + 1, 1_000))))
            self._grown.notify_all()
        return len(log)

    def _own(self, tenant: str, session_id: str) -> dict[str, Any]:
        if self.fault:
            fault, self.fault = self.fault, None
            raise fault
        if self.tenants.get(session_id) != tenant:
            raise NotFound(f"there is no session {session_id!r}", param="session_id")
        return self.views[session_id]

    async def create_session(self, tenant: str, command: SessionCreate) -> tuple[dict[str, Any], bool]:
        if command.key in self.keys:
            return self.views[self.keys[command.key]], True
        session_id = self.keys[command.key] = f"sess_{len(self.keys) + 1}"
        self.tenants[session_id], self.logs[session_id] = tenant, []
        self.views[session_id] = {"id": session_id, "title": command.title or "", "updated_at": next(self._ids)}
        await self.append(session_id, events.session_created(self.views[session_id]))
        return self.views[session_id], False

    async def update_session(self, tenant: str, command: SessionUpdate) -> dict[str, Any]:
        view = self._own(tenant, command.session_id)
        view["title"] = command.title
        return view

    async def delete_session(self, tenant: str, session_id: str) -> None:
        self._own(tenant, session_id)
        await self.append(session_id, events.session_deleted())
        del self.views[session_id], self.tenants[session_id]

    async def list_sessions(
        self, tenant: str, limit: int = 50, before: str | None = None, words: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        views = [view for session_id, view in self.views.items() if self.tenants[session_id] == tenant]
        newest_first = sorted(views, key=lambda view: -view["updated_at"])
        ids = [view["id"] for view in newest_first]
        return newest_first[ids.index(before) + 1 if before else 0 :][:limit]

    async def get_session(self, tenant: str, session_id: str) -> dict[str, Any]:
        return {**self._own(tenant, session_id), "messages": []}

    async def attach(self, tenant: str, session_id: str, epoch: int | None, after_seq: int | None) -> Attached:
        view, head_seq = self._own(tenant, session_id), len(self.logs[session_id])
        if after_seq is None or epoch not in (None, 1):
            return Attached(session_id, 1, head_seq, "snapshot", {**view, "messages": []}, head_seq)
        return Attached(session_id, 1, head_seq, "replay", None, after_seq)

    async def follow_batches(
        self, session_id: str, after_seq: int, *, epoch: int | None = None
    ) -> AsyncIterator[list[Entry]]:
        log = self.logs[session_id]
        while session_id in self.views:
            async with self._grown:
                while len(log) <= after_seq:
                    await self._grown.wait()
            batch = log[after_seq : after_seq + 256]  # as many as the real one reads at once
            after_seq += len(batch)
            yield batch

    async def follow(self, session_id: str, after_seq: int, *, epoch: int | None = None) -> AsyncIterator[Entry]:
        async for batch in self.follow_batches(session_id, after_seq):
            for entry in batch:
                yield entry

    async def create_response(self, tenant: str, command: ResponseCreate) -> Accepted:
        """Answer with the input, a word a delta; "wait" is answered with a reply that goes on until it is cancelled."""
        self._own(tenant, command.session_id)
        number = next(self._ids)
        response_id, user_id, text = f"resp_{number}", f"user_{number}", command.input[0].text
        names = {"response_id": response_id, "message_id": f"reply_{number}", "parent_id": user_id, "model": INFO.model}
        parent_id = self.views[command.session_id].get("head_id")
        message = events.message_object(message_id=user_id, parent_id=parent_id, role="user", text=text, created_at=1)
        await self.append(command.session_id, events.message_created(message))
        created = events.response_created(events.response_object(**names, status="in_progress"))
        head_seq = await self.append(command.session_id, created)
        self.views[command.session_id]["head_id"] = names["message_id"]
        offset = 0
        for word in text.split():
            delta = events.output_text_delta(response_id=response_id, offset=offset, delta=word + " ")
            await self.append(command.session_id, delta)
            offset += len(word) + 1
        self.running[response_id] = {**names, "text": text}
        if text != "wait":
            await self.end(command.session_id, response_id, "completed")
        return Accepted(user_id, response_id, head_seq, False)

    async def end(self, session_id: str, response_id: str, status: str) -> None:
        """End a running reply."""
        usage = events.usage_object(input_tokens=20, output_tokens=3, cached_tokens={"device": 12})
        response = events.response_object(
            **self.running.pop(response_id), status=status, usage=usage, timings=dict(TIMINGS)
        )
        await self.append(session_id, {"type": f"response.{status}", "response": response})

    async def cancel_response(self, tenant: str, session_id: str, response_id: str) -> str:
        self._own(tenant, session_id)
        if response_id not in self.running:
            return "completed"
        await self.end(session_id, response_id, "cancelled")
        return "cancelling"

    async def typing(self, tenant: str, session_id: str) -> None:
        self.typed.append(session_id)

    async def resume(
        self, tenant: str, session_id: str, epoch: int | None, after_seq: int | None, warm: bool
    ) -> dict[str, Any]:
        self._own(tenant, session_id)
        return {"epoch": 1, "head_seq": len(self.logs[session_id]), "mode": "replay", "events": [], "warm": warm}

    async def session_cache(self, tenant: str, session_id: str) -> dict[str, Any]:
        self._own(tenant, session_id)
        return {"tokens": 20, "device": 12, "host": 0, "disk": 8, "restore_ms_estimate": 1.5}

    async def drain(self, timeout_s: float) -> None:
        self.drained = True

    async def ping(self) -> None:
        if isinstance(self.fault, ServiceError):
            raise self.fault
