"""A session manager over a real Redis, with a deterministic engine, and helpers to speak to it."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from chatserve.protocol.codec import command_from, from_wire
from chatserve.protocol.commands import ResponseCreate, SessionCreate, SessionFork, SessionUpdate
from chatserve.sessions.accept import Accepted
from chatserve.sessions.limits import SessionLimits
from chatserve.sessions.manager import SessionManager
from chatserve.storage.connection import open_redis
from chatserve.storage.embedded import EmbeddedRedis
from chatserve.storage.session_store import SessionStore
from chatserve.text.pipeline import TextPipeline
from tests.sessions.fakes import FakeEngine, FakeRecords, UnreliableStore
from tests.text.tokenizers import chatml

TERMINAL = ("response.completed", "response.incomplete", "response.cancelled", "response.failed")
LIMITS = SessionLimits(store_retry_s=0.005, requeue_delay_s=0.005, cancel_grace_s=0.2)
TOKENIZER = chatml()
EOS = TOKENIZER.eos_token_id
_keys = itertools.count(1)


def pseudo_random_token(token_ids: Sequence[int]) -> int:
    """Any byte, pieces of code points among them, as a hash of the ids before; an end token every forty or so."""
    value = (sum(token_ids[-7:]) * 2654435761 + len(token_ids) * 40503) % (1 << 20)
    return EOS if value % 41 == 0 else 3 + value // 41 % (len(TOKENIZER) - 3)


def saying(*replies: str) -> Callable[[Sequence[int]], int]:
    """Answers the first user message with the first reply, and so on, then ends."""
    spoken = [[*TOKENIZER.encode(reply, add_special_tokens=False), EOS] for reply in replies]
    opening = TOKENIZER.encode("<|im_start|>assistant\n", add_special_tokens=False)

    def choose(token_ids: Sequence[int]) -> int:
        starts = [i for i in range(len(token_ids)) if list(token_ids[i : i + len(opening)]) == opening]
        num_said = len(token_ids) - starts[-1] - len(opening)
        return spoken[len(starts) - 1][num_said]

    return choose


class Chat:
    """One tenant's view of a manager."""

    def __init__(self, manager: SessionManager, tenant: str = "t") -> None:
        self.manager = manager
        self.tenant = tenant

    async def create(self, **fields: Any) -> str:
        view, _ = await self.manager.create_session(self.tenant, command("session.create", **fields))
        session_id: str = view["id"]
        return session_id

    async def send(self, session_id: str, text: str | None = None, **fields: Any) -> Accepted:
        fields |= {} if text is None else {"input": text}
        return await self.manager.create_response(
            self.tenant, command("response.create", session_id=session_id, **fields)
        )

    async def ask(self, session_id: str, text: str | None = None, **fields: Any) -> dict[str, Any]:
        """Send, wait for the end, and give the terminal event."""
        accepted = await self.send(session_id, text, **fields)
        return (await self.events(session_id, accepted.head_seq))[-1]

    async def events(self, session_id: str, after_seq: int = 0, *, until: Sequence[str] = TERMINAL) -> list[Any]:
        """The events after a cursor up to the first of a type in `until`."""
        collected = []
        async with asyncio.timeout(10), aclosing(self.manager.follow(session_id, after_seq)) as entries:
            async for entry in entries:
                collected.append(from_wire(entry.wire))
                if collected[-1]["type"] in until:
                    break
        return collected

    async def state(self, session_id: str) -> dict[str, Any]:
        return await self.manager.get_session(self.tenant, session_id)


def command(name: str, **fields: Any) -> Any:
    """A command as it comes from the wire, with an id and a key of its own where none is given."""
    number = next(_keys)
    keyed = {} if name in ("session.update", "session.delete") else {"key": f"k{number}"}
    made = command_from({"type": name, "id": f"c{number}", **keyed, **fields})
    assert isinstance(made, ResponseCreate | SessionCreate | SessionFork | SessionUpdate)
    return made


def assert_coherent(events: list[Any]) -> None:
    """One terminal event, no gap, and every text in agreement with every other."""
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["type"] in TERMINAL for event in events] == [False] * (len(events) - 1) + [True]
    text = ""
    for event in events:
        if event["type"].endswith("delta"):
            assert event["offset"] == len(text)
            text += event["delta"]
        if event["type"] == "response.resumed":
            assert event["offset"] == len(text)
    assert text == events[-2]["text"] == events[-1]["response"]["text"]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedRedis]:
    """A running Redis, shared."""
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis") / "data")
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def redis(server: EmbeddedRedis, tmp_path: Path) -> AsyncIterator[Redis]:
    """A client of the shared server, which is empty."""
    async with open_redis(f"unix://{server.socket_path}", tmp_path) as client:
        await client.flushall()
        yield client


@dataclasses.dataclass
class Stage:
    """Makes managers on one Redis; the first part of each life is `start`, the last is the fixture's end."""

    redis: Redis
    text: TextPipeline
    managers: list[SessionManager] = dataclasses.field(default_factory=list)
    stores: list[SessionStore] = dataclasses.field(default_factory=list)
    records: FakeRecords = dataclasses.field(default_factory=FakeRecords)

    def line(self) -> UnreliableStore:
        """A store of a new instance, whose line can be interrupted."""
        store = SessionStore(self.redis, f"instance-{len(self.stores)}", durable=True)
        self.stores.append(store)
        return UnreliableStore(store)

    async def start(
        self, engine: FakeEngine, line: Any = None, limits: SessionLimits = LIMITS, text: TextPipeline | None = None
    ) -> Chat:
        manager = SessionManager(line or self.line(), engine, text or self.text, self.records, limits)
        self.managers.append(manager)
        await manager.start()
        return Chat(manager)


@pytest.fixture(scope="session")
def text() -> TextPipeline:
    """The pipeline of the tests' small tokenizer."""
    return TextPipeline(TOKENIZER, [EOS])


@pytest.fixture
async def stage(redis: Redis, text: TextPipeline) -> AsyncIterator[Stage]:
    """Makes managers and closes them."""
    stage = Stage(redis, text)
    yield stage
    for manager in stage.managers:
        await manager.close()
    for store in stage.stores:
        await store.close()
