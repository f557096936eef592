"""Sessions as surfaces need them that speak in whole conversations and single responses.

A response is found by its session's and its own id, a session begins with messages said elsewhere, and a conversation
that is sent whole gets the tokens of a stored one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from chatserve.errors import NotFound
from chatserve.protocol.commands import SessionCreate
from chatserve.sessions.histories import Histories
from chatserve.sessions.opening import Opening, opened_session
from chatserve.sessions.registry import SessionRegistry
from chatserve.sessions.session import LiveSession
from chatserve.sessions.tasks import TaskGroup
from chatserve.sessions.tree import path_to
from chatserve.sessions.turn import TurnTools
from chatserve.storage.session_store import MessageRecord, SessionMeta
from chatserve.text.pipeline import PathMessage

WriteNew = Callable[[SessionMeta, SessionCreate, Sequence[MessageRecord]], Awaitable[tuple[dict[str, Any], bool]]]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response as it stands. `path` are the messages before its reply; `reply.text` is what is said at `head_seq`."""

    session_id: str
    instructions: str
    epoch: int
    head_seq: int
    response: Mapping[str, Any]
    reply: MessageRecord
    path: Sequence[MessageRecord]

    @property
    def inner_id(self) -> str:
        """Its id within the session."""
        return str(self.response["id"])

    @property
    def is_running(self) -> bool:
        """Whether it is still being made."""
        return bool(self.response["status"] == "in_progress")


class Conversations:
    """`write_new` writes a session with its messages; `clock` gives seconds since 1970."""

    def __init__(
        self,
        registry: SessionRegistry,
        tools: TurnTools,
        tasks: TaskGroup,
        clock: Callable[[], float],
        write_new: WriteNew,
    ) -> None:
        self.histories = Histories(tools.store, registry, tools.text, tools.limits, tasks, clock)
        self._registry = registry
        self._tools = tools
        self._clock = clock
        self._write_new = write_new

    async def begin(self, tenant: str, command: SessionCreate, opening: Opening) -> tuple[dict[str, Any], bool]:
        """A new session with messages, and whether this very command made it before.

        Raises NotFound for a session or message that the opening names and that there is not.
        """
        async with AsyncExitStack() as stack:
            base = None
            if opening.session_id is not None:
                base = await stack.enter_async_context(self._registry.view(opening.session_id, tenant))
            now_ms = int(self._clock() * 1000)
            model = self._tools.engine.info.model
            meta, messages = await opened_session(tenant, command, opening, base, self._tools.text, model, now_ms)
        return await self._write_new(meta, command, messages)

    async def find_response(self, tenant: str, session_id: str, response_id: str) -> StoredResponse:
        """The response. Raises NotFound for no such session or response."""
        async with self._registry.view(session_id, tenant) as live:
            for message in live.messages.values():
                if message.response is not None and message.response["id"] == response_id:
                    return _stored(live, message)
        raise NotFound(f"there is no response {response_id!r}", code="response_not_found", param="response_id")

    async def began(self, tenant: str, key: str) -> bool:
        """Whether a session was begun under this key before."""
        return await self._tools.store.find_key(tenant, key) is not None

    async def prompt(
        self, tenant: str, said: Sequence[PathMessage], *, instructions: str, param: str = "messages"
    ) -> list[int]:
        """The ids to which the model replies, those of a stored session where one began in the same words.

        Raises BadRequest that names `param` where the chat template does not take these roles.
        """
        model = self._tools.engine.info.model
        return await self.histories.prompt(tenant, said, instructions=instructions, model=model, param=param)


def _stored(live: LiveSession, reply: MessageRecord) -> StoredResponse:
    return StoredResponse(
        session_id=live.id,
        instructions=live.meta.instructions,
        epoch=live.meta.epoch,
        head_seq=live.tail.head_seq,
        response=dict(reply.response or {}),
        reply=dataclasses.replace(reply),
        path=path_to(live.messages, live.messages[reply.parent_id] if reply.parent_id else None),
    )
