"""Everything at once: people who talk and cancel, a store that fails every few calls, servers that die."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from chatserve.errors import ServiceError
from chatserve.protocol.codec import from_wire
from chatserve.sessions.limits import SessionLimits
from tests.sessions.conftest import TERMINAL, Chat, Stage, command, pseudo_random_token
from tests.sessions.fakes import FakeEngine, UnreliableStore

NUM_PEOPLE, NUM_TURNS, NUM_DEATHS = 10, 4, 3
LIMITS = SessionLimits(
    delta_interval_s=0.001,
    store_retry_s=0.002,
    requeue_delay_s=0.002,
    cancel_grace_s=0.3,
    max_idle_sessions=3,
    tail_entries=4,
)
T = TypeVar("T")


class World:
    """The server that lives now, and people who send everything again until it is answered."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.random = random.Random(seed)
        self._stage = stage
        self._line: UnreliableStore | None = None
        self.chat: Chat | None = None

    async def begin_life(self) -> None:
        if self._line is not None:
            self._line.cut.set()
        self._line = self._stage.line()
        self._line.random = self.random
        self.chat = await self._stage.start(FakeEngine(pseudo_random_token, pace_s=0.001), self._line, LIMITS)
        self._line.failure_rate = 0.1

    async def insist(self, work: Callable[[Chat], Awaitable[T]]) -> T:
        while True:
            assert self.chat is not None
            try:
                return await asyncio.wait_for(work(self.chat), 0.5)
            except (ServiceError, TimeoutError):
                await asyncio.sleep(0.005)

    async def die_now_and_then(self) -> None:
        for _ in range(NUM_DEATHS):
            await asyncio.sleep(0.2)
            await self.begin_life()

    async def talk(self, person: int) -> tuple[str, list[str]]:
        """One person's conversation: the session and the responses in order."""
        wish = command("session.create")
        view, _ = await self.insist(lambda chat: chat.manager.create_session("t", wish))
        responses = [await self._take_turn(view["id"], f"{person} {turn}") for turn in range(NUM_TURNS)]
        return view["id"], responses

    async def _take_turn(self, session_id: str, text: str) -> str:
        num_tokens = self.random.randrange(1, 25)
        wish = command(
            "response.create", session_id=session_id, input=text, max_output_tokens=num_tokens, ignore_eos=True
        )
        accepted = await self.insist(lambda chat: chat.manager.create_response("t", wish))
        if self.random.random() < 0.3:
            await asyncio.sleep(self.random.random() * 0.02)
            await self.insist(lambda chat: chat.manager.cancel_response("t", session_id, accepted.response_id))
        while (await self.insist(lambda chat: chat.state(session_id)))["active_response"] is not None:
            await asyncio.sleep(0.005)
        return accepted.response_id


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(3, 60))])
async def test_every_accepted_turn_ends_once_with_one_text(stage: Stage, seed: int) -> None:
    """Whatever fails: each turn has one message and one terminal event, each log no gap, each text no contradiction."""
    world = World(stage, seed)
    await world.begin_life()
    dying = asyncio.create_task(world.die_now_and_then())
    conversations = await asyncio.gather(*(world.talk(person) for person in range(NUM_PEOPLE)))
    await dying
    for session_id, responses in conversations:
        entries = await stage.stores[-1].read_log(session_id, 0, 100_000)
        assert_consistent([from_wire(entry.wire) for entry in entries], responses)


def assert_consistent(events: list[dict[str, Any]], responses: list[str]) -> None:
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["response"]["id"] for event in events if event["type"] in TERMINAL] == responses
    assert sum(event["type"] == "message.created" for event in events) == NUM_TURNS
    texts = dict.fromkeys(responses, "")
    for event in events:
        response_id = event.get("response_id", "")
        if "offset" in event:
            assert event["offset"] == len(texts[response_id])
        if "delta" in event:
            texts[response_id] += event["delta"]
        if event["type"] == "response.output_text.done":
            assert event["text"] == texts[response_id]
        if event["type"] in TERMINAL:
            assert event["response"]["text"] == texts[event["response"]["id"]]
