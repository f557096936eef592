"""From a `response.create` to a turn that can start: what it hangs on, what it says, whether it fits.

Nothing is written here; the result is one change that the session commits before the turn runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pydantic_core import to_json

from chatserve.errors import BadRequest
from chatserve.protocol import events
from chatserve.protocol.commands import ResponseCreate, SessionCreate, SessionFork, TokenIdsPart
from chatserve.sessions import views
from chatserve.sessions.ids import new_id
from chatserve.sessions.plan import TurnPlan, output_room, turn_params
from chatserve.sessions.portable import SessionImport
from chatserve.sessions.session import Change, Draft, LiveSession
from chatserve.sessions.tree import parent_of_turn, path_to, prompt_path
from chatserve.sessions.turn import TurnTools
from chatserve.storage.session_store import IdempotencyKey, MessageRecord
from chatserve.text.pipeline import Prompt


@dataclass(frozen=True, slots=True)
class Accepted:
    """What `response.create` answers. `message_id` is the user's new message, if there is one."""

    message_id: str | None
    response_id: str
    head_seq: int
    duplicate: bool


@dataclass(frozen=True, slots=True)
class PreparedTurn:
    """A turn before it is accepted: `change` makes it so."""

    plan: TurnPlan
    prompt_ids: list[int]
    change: Change
    accepted: Accepted


def body_hash(
    command: ResponseCreate | SessionCreate | SessionFork | SessionImport, request: Mapping[str, Any] | None = None
) -> str:
    """A hash of what a command says, apart from its id and key: a repeated key must come with the same."""
    said = {entry.name: getattr(command, entry.name) for entry in fields(command) if entry.name not in ("id", "key")}
    return hashlib.sha256(to_json(said if request is None else {**said, "request": request})).hexdigest()


async def prepare_turn(
    live: LiveSession, command: ResponseCreate, tools: TurnTools, request: dict[str, Any] | None = None
) -> PreparedTurn:
    """Everything about the turn, decided; `request` is kept with the reply.

    Raises BadRequest or NotFound where it cannot be.
    """
    model = tools.engine.info.model
    said = _said(command, tools.engine.info.vocab_size)
    parent = parent_of_turn(live.messages, live.meta.head_id, command.parent_id, has_input=said is not None)
    path = prompt_path(live.messages, path_to(live.messages, parent), model)
    prompt = await tools.text.prompt(path, said, instructions=live.meta.instructions, date=live.meta.template_date)
    user = None if said is None else _user_message(live, parent, said, prompt, tools)
    speaker = user or parent
    assert speaker is not None
    plan = _plan(live, command, tools, prompt, speaker, num_new=1 if user is None else 2)
    return _prepared(live, command, plan, prompt, user, request)


async def history_ids(live: LiveSession, tools: TurnTools) -> list[int]:
    """The ids that a turn goes on from; none where they are rendered at each turn and none was taken yet."""
    path = views.branch(live)
    if not views.has_ids(path) and not any((message.response or {}).get("usage") for message in path):
        return []
    said = prompt_path(live.messages, path, tools.engine.info.model)
    prompt = await tools.text.prompt(said, None, instructions=live.meta.instructions, date=live.meta.template_date)
    return prompt.token_ids


def _said(command: ResponseCreate, vocab_size: int) -> str | Sequence[int] | None:
    """The input as text or raw ids; None without any."""
    if command.input is None:
        return None
    first = command.input[0]
    if not isinstance(first, TokenIdsPart):
        return "".join(part.text for part in command.input if not isinstance(part, TokenIdsPart))
    if max(first.token_ids) >= vocab_size:
        raise BadRequest(
            f"token id {max(first.token_ids)} is not in the vocabulary: ids are below {vocab_size}", param="input"
        )
    return first.token_ids


def _user_message(
    live: LiveSession, parent: MessageRecord | None, said: str | Sequence[int], prompt: Prompt, tools: TurnTools
) -> MessageRecord:
    now_ms = _time_behind(live, parent)
    return MessageRecord(
        id=new_id("msg", now_ms),
        parent_id=parent.id if parent else None,
        role="user",
        text=said if isinstance(said, str) else tools.text.decode(said),
        token_ids=prompt.added_ids,
        state="complete",
        created_at=now_ms,
    )


def _time_behind(live: LiveSession, parent: MessageRecord | None) -> int:
    """Now, but later than the parent: stored messages are ordered by their times."""
    return max(live.now_ms(), parent.created_at + 1 if parent else 0)


def _plan(
    live: LiveSession,
    command: ResponseCreate,
    tools: TurnTools,
    prompt: Prompt,
    speaker: MessageRecord,
    num_new: int,
) -> TurnPlan:
    now_ms = _time_behind(live, speaker)
    params = turn_params(command, live.meta.params, tools.limits)
    room = output_room(len(prompt.token_ids), tools.engine.info.max_context)
    return TurnPlan(
        response_id=new_id("resp", now_ms),
        message_id=new_id("msg", now_ms),
        parent_id=speaker.id,
        model=tools.engine.info.model,
        seq=live.tail.head_seq + num_new,
        created_at=now_ms,
        num_prompt=len(prompt.token_ids),
        num_history=prompt.num_history,
        miss_reason=_miss_reason(live, prompt),
        fills_window=params.max_output_tokens > room,
        **{**params.as_map(), "max_output_tokens": min(params.max_output_tokens, room)},
    )


def _miss_reason(live: LiveSession, prompt: Prompt) -> str | None:
    """Why the prompt's history is shorter than the session's: known before the engine is asked."""
    if prompt.reason or prompt.num_history:
        return prompt.reason
    return "input_changed" if live.messages else "first_turn"


def _prepared(
    live: LiveSession,
    command: ResponseCreate,
    plan: TurnPlan,
    prompt: Prompt,
    user: MessageRecord | None,
    request: dict[str, Any] | None,
) -> PreparedTurn:
    response = events.response_object(
        response_id=plan.response_id,
        message_id=plan.message_id,
        parent_id=plan.parent_id,
        model=plan.model,
        status="in_progress",
    )
    reply = MessageRecord(
        id=plan.message_id,
        parent_id=plan.parent_id,
        role="assistant",
        text="",
        token_ids=[],
        state="in_progress",
        created_at=plan.created_at,
        response=response,
        request=request,
    )
    accepted = Accepted(user.id if user else None, plan.response_id, plan.seq, duplicate=False)
    messages = [user, reply] if user else [reply]
    meta: dict[str, Any] = {
        "active": plan.as_map(),
        "head_id": plan.message_id,
        "num_messages": len(live.messages) + len(messages),
        "updated_at": plan.created_at,
    }
    result = {"message_id": accepted.message_id, "response_id": plan.response_id, "head_seq": plan.seq}
    key = IdempotencyKey(live.id, command.key, body_hash(command, request), result)
    created = [Draft(events.message_created(_message_object(user)))] if user else []
    change = Change([*created, Draft(events.response_created(response))], messages, meta, key)
    return PreparedTurn(plan, prompt.token_ids, change, accepted)


def _message_object(user: MessageRecord) -> events.Event:
    return events.message_object(
        message_id=user.id, parent_id=user.parent_id, role="user", text=user.text, created_at=user.created_at
    )
