"""Where a stored response takes place: as a turn of a session, which `previous_response_id` names or which is new.

A response goes on in the session of the one before it, on a branch where that is not its head. A new session with a
copy of the path is begun where the instructions are others, more than one message is new, or another response runs.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from chatserve.errors import Conflict, NotFound, ServiceError
from chatserve.protocol.commands import ResponseCreate, SessionCreate, TextPart
from chatserve.server.hub import Hub
from chatserve.server.openai.fields import not_supported
from chatserve.server.openai.response_body import WantedResponse
from chatserve.server.openai.response_object import no_response, private_ids
from chatserve.sessions.conversations import StoredResponse
from chatserve.sessions.manager import SessionManager
from chatserve.sessions.opening import Opening
from chatserve.text.pipeline import PathMessage


async def find_response(
    sessions: SessionManager, tenant: str, response_id: str, param: str = "response_id"
) -> StoredResponse:
    """The stored response with this public id. Raises NotFound that names `param`."""
    session_id, inner_id = private_ids(response_id, param)
    try:
        return await sessions.conversations.find_response(tenant, session_id, inner_id)
    except NotFound:
        raise no_response(response_id, param) from None


@dataclass(frozen=True, slots=True)
class Task:
    """A response that is wanted, by whom, and what it goes on from.

    `key` makes asking for it again harmless; `is_keyed` says that the client made it, and so may ask again.
    """

    tenant: str
    wanted: WantedResponse
    previous: StoredResponse | None
    key: str
    is_keyed: bool

    @property
    def system(self) -> str:
        """What the system said in the input of the first response: it holds for all that follow."""
        if self.previous is None:
            return self.wanted.system
        return str((self.previous.reply.request or {}).get("system", ""))

    @property
    def instructions(self) -> str:
        """What the session must be instructed with."""
        return "\n\n".join(text for text in (self.wanted.instructions, self.system) if text)

    @property
    def history(self) -> list[PathMessage]:
        """What was said before, as text."""
        if self.previous is None:
            return []
        return [PathMessage(message.role, message.text, ()) for message in (*self.previous.path, self.previous.reply)]


async def read_task(sessions: SessionManager, tenant: str, wanted: WantedResponse, key: str | None) -> Task:
    """The task with the response it goes on from.

    Raises NotFound for no such response, Conflict while that is being made, BadRequest for a system message behind it.
    """
    given = key or secrets.token_hex(16)
    if wanted.previous_response_id is None:
        return Task(tenant, wanted, None, given, key is not None)
    previous = await find_response(sessions, tenant, wanted.previous_response_id, "previous_response_id")
    if previous.is_running:
        raise Conflict("the previous response is still being made: wait for its end", param="previous_response_id")
    if wanted.system:
        raise not_supported("input.0.role", "a system message can only open a conversation; use 'instructions'")
    return Task(tenant, wanted, previous, given, key is not None)


async def accept(sessions: SessionManager, hub: Hub, task: Task) -> StoredResponse:
    """Begin the response, or find it begun under the same key. Raises what the session manager raises."""
    if await _can_go_on(sessions, task):
        assert task.previous is not None
        try:
            return await _begin_turn(sessions, task, task.previous.session_id, task.previous.reply.id)
        except Conflict as conflict:
            if conflict.code != "response_in_progress":
                raise
    return await _begin_in_new_session(sessions, hub, task)


async def _can_go_on(sessions: SessionManager, task: Task) -> bool:
    """Whether the previous response's session can hold this one, and holds no other place for it already."""
    previous = task.previous
    if previous is None or previous.instructions != task.instructions or len(task.wanted.conversation.said) > 1:
        return False
    return not (task.is_keyed and await sessions.conversations.began(task.tenant, task.key))


async def _begin_in_new_session(sessions: SessionManager, hub: Hub, task: Task) -> StoredResponse:
    """A refused response leaves no session behind, unless the client has a key to find it by."""
    session_id, is_new = await _begin_session(sessions, task)
    try:
        found = await _begin_turn(sessions, task, session_id, None)
    except ServiceError:
        if is_new and not task.is_keyed:
            await sessions.delete_session(task.tenant, session_id)
        raise
    if is_new:
        hub.sessions_changed(task.tenant)
    return found


async def _begin_session(sessions: SessionManager, task: Task) -> tuple[str, bool]:
    """The session's id, and whether it is new."""
    previous, said = task.previous, task.wanted.conversation.said
    command = SessionCreate(id="http", key=task.key, instructions=task.instructions)
    before = said[:-1]
    opening = Opening(previous.session_id, previous.reply.id, before) if previous else Opening(said=before)
    view, duplicate = await sessions.conversations.begin(task.tenant, command, opening)
    return str(view["id"]), not duplicate


async def _begin_turn(sessions: SessionManager, task: Task, session_id: str, parent_id: str | None) -> StoredResponse:
    wanted, sampling = task.wanted, task.wanted.sampling
    command = ResponseCreate(
        id="http",
        session_id=session_id,
        key=task.key,
        parent_id=parent_id,
        input=(TextPart(text=wanted.conversation.said[-1].text),),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_output_tokens=wanted.max_tokens,
        seed=wanted.seed,
        stop=wanted.stop or None,
        ignore_eos=wanted.ignore_eos,
    )
    request = {"asked": dict(wanted.asked), "system": task.system, "body": wanted.body_hash}
    accepted = await sessions.create_response(task.tenant, command, request)
    return await sessions.conversations.find_response(task.tenant, session_id, accepted.response_id)
