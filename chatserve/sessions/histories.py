"""Prompts of conversations that come whole, with the tokens of a stored session where one began in the same words.

Sessions are found by a hash chained from message to message, of their branch head's path only. The index is in memory,
bounded, and filled from the store when a tenant first asks; what it does not find is rendered, which is right as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from chatserve.errors import BadRequest, NotFound, Unavailable
from chatserve.sessions.limits import SessionLimits
from chatserve.sessions.ports import Store
from chatserve.sessions.registry import SessionRegistry
from chatserve.sessions.session import LiveSession
from chatserve.sessions.tasks import TaskGroup
from chatserve.sessions.tree import ROOT, path_to, prompt_path
from chatserve.storage.session_store import MessageRecord, SessionMeta
from chatserve.text.pipeline import PathMessage, TextPipeline


@dataclass(frozen=True, slots=True)
class Beginning:
    """The messages of a conversation whose tokens are known, and the date that its template reads."""

    path: Sequence[PathMessage]
    date: str


class Histories:
    """The beginnings of one server's stored conversations. `clock` gives seconds since 1970."""

    def __init__(
        self,
        store: Store,
        registry: SessionRegistry,
        text: TextPipeline,
        limits: SessionLimits,
        tasks: TaskGroup,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._registry = registry
        self._text = text
        self._limits = limits
        self._tasks = tasks
        self._clock = clock
        self._places: OrderedDict[bytes, tuple[str, str]] = OrderedDict()
        self._filling: dict[str, asyncio.Task[None]] = {}

    def note(self, live: LiveSession) -> None:
        """Remember the replies on the session's branch."""
        self._note(live.meta, live.messages)

    async def prompt(
        self, tenant: str, said: Sequence[PathMessage], *, instructions: str, model: str, param: str
    ) -> list[int]:
        """The ids to which the model replies; see `Conversations.prompt`."""
        found = await self._find(tenant, said, instructions, model) if is_dialogue(said) else None
        if found is None:
            return await self._rendered(said, instructions, param)
        rest = said[len(found.path) :]
        path = await self._text.extended(found.path, rest, instructions=instructions, date=found.date)
        return (await self._text.prompt(path, None, instructions=instructions, date=found.date)).token_ids

    async def _rendered(self, said: Sequence[PathMessage], instructions: str, param: str) -> list[int]:
        token_ids = await self._text.conversation(said, instructions=instructions, date=self._today())
        if token_ids is None:
            raise BadRequest(
                "this model's chat template does not take messages in this order of roles: after an opening system "
                "message let user and assistant take turns",
                code="not_supported",
                param=param,
            )
        return token_ids

    async def _find(self, tenant: str, said: Sequence[PathMessage], instructions: str, model: str) -> Beginning | None:
        """The longest beginning that is stored."""
        await self._fill(tenant)
        digests = list(_digests(tenant, instructions, said))
        for num_messages in range(len(said) - 1, 0, -2):
            place = self._places.get(digests[num_messages - 1])
            if place is not None:
                beginning = await self._beginning(tenant, *place, model)
                if beginning is not None and _is_same(beginning.path, said[:num_messages]):
                    return beginning
        return None

    async def _beginning(self, tenant: str, session_id: str, message_id: str, model: str) -> Beginning | None:
        """The path to a message, unless it was deleted or the store is away."""
        try:
            async with self._registry.view(session_id, tenant) as live:
                path = path_to(live.messages, live.messages.get(message_id))
                return Beginning(prompt_path(live.messages, path, model), live.meta.template_date)
        except (NotFound, Unavailable):
            return None

    async def _fill(self, tenant: str) -> None:
        """Once for each tenant, note its newest sessions; again with the next request where the store is away."""
        filling = self._filling.get(tenant)
        if filling is None:
            filling = self._filling[tenant] = self._tasks.spawn(self._read(tenant), name=f"histories-{tenant}")
            filling.add_done_callback(lambda done: self._filled(tenant, done))
        with contextlib.suppress(Unavailable):
            await asyncio.shield(filling)

    def _filled(self, tenant: str, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is not None:
            del self._filling[tenant]

    async def _read(self, tenant: str) -> None:
        newest_first = await self._store.list_sessions(tenant, self._limits.histories_read)
        for meta in reversed(newest_first):
            self._note(meta, await self._store.load_messages(meta.id))

    def _note(self, meta: SessionMeta, messages: Mapping[str, MessageRecord]) -> None:
        path = path_to(messages, messages.get(meta.head_id or ROOT))
        for message, digest in zip(path, _digests(meta.tenant, meta.instructions, path), strict=True):
            if message.role == "assistant" and message.state != "in_progress":
                self._places[digest] = meta.id, message.id
                self._places.move_to_end(digest)
        while len(self._places) > self._limits.max_histories:
            self._places.popitem(last=False)

    def _today(self) -> str:
        return datetime.date.fromtimestamp(self._clock()).isoformat()


def is_dialogue(said: Sequence[PathMessage]) -> bool:
    """Whether user and assistant take turns, as in a session."""
    return all(message.role == role for message, role in zip(said, cycle(("user", "assistant")), strict=False))


def _is_same(path: Sequence[PathMessage], said: Sequence[PathMessage]) -> bool:
    return [(message.role, message.text) for message in path] == [(message.role, message.text) for message in said]


def _digests(tenant: str, instructions: str, messages: Iterable[PathMessage | MessageRecord]) -> Iterator[bytes]:
    """For each message a hash of it and of all that was said before it."""
    digest = _chained(_chained(b"", "tenant", tenant), "system", instructions)
    for message in messages:
        digest = _chained(digest, message.role, message.text)
        yield digest


def _chained(before: bytes, role: str, text: str) -> bytes:
    return hashlib.blake2b(before + f"{role}\n{text}".encode(), digest_size=16).digest()
