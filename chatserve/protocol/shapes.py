"""What every event of protocol `chatserve.v1` looks like, as typed dicts: for the reference, and for tests to hold.

`events` builds them. A field that is not required is left out where there is nothing to say. No I/O.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from chatserve.protocol.events import Cache, ErrorObject, IncompleteReason, Role, TextContent, Timings, Usage

Status = Literal["in_progress", "completed", "incomplete", "cancelled", "failed"]
MessageState = Literal["complete", "in_progress", "incomplete", "cancelled", "failed"]


class Session(TypedDict):
    """A session without its messages. `head_id` is the last message of the branch in use; times in milliseconds."""

    id: str
    title: str
    instructions: str
    metadata: dict[str, str]
    params: dict[str, Any]
    archived: bool
    pinned: bool
    created_at: int
    updated_at: int
    head_id: str | None
    num_messages: int


class ListedSession(Session):
    """A session with where its log stands, as answers and lists give it."""

    epoch: int
    head_seq: int
    active_response_id: str | None


class IncompleteDetails(TypedDict):
    """Which limit a reply ran into."""

    reason: IncompleteReason


class Response(TypedDict):
    """One reply. `text`, `usage`, `timings` and `cache` come with its end; `text` also while it runs, in snapshots.

    `resumed` is there, and true, where it was interrupted and went on.
    """

    id: str
    message_id: str
    parent_id: str
    model: str
    status: Status
    text: NotRequired[str]
    usage: NotRequired[Usage]
    timings: NotRequired[Timings]
    cache: NotRequired[Cache]
    resumed: NotRequired[bool]
    incomplete_details: NotRequired[IncompleteDetails]
    error: NotRequired[ErrorObject]


class Message(TypedDict):
    """One message of the tree; the first ones have no parent. `created_at` in milliseconds."""

    id: str
    parent_id: NotRequired[str]
    role: Role
    content: list[TextContent]
    created_at: int


class StoredMessage(Message):
    """A message in a snapshot; a reply comes with its response, without the text again."""

    state: MessageState
    response: NotRequired[Response]


class Context(TypedDict):
    """Tokens of the branch in use, of what fits, and what is left for input and reply."""

    used_tokens: int
    max_tokens: int
    left_tokens: int


class Snapshot(ListedSession):
    """A session as it stands at `head_seq`: all its messages, of every branch, and the reply in progress."""

    messages: list[StoredMessage]
    active_response: Response | None
    context: Context


class Server(TypedDict):
    """Who answers."""

    name: str
    version: str


class Limits(TypedDict):
    """Bytes of a message, sessions that one connection may follow, connections of one key."""

    max_message_bytes: int
    max_sessions: int
    max_connections: int


class Model(TypedDict):
    """A model that is served; `max_context` bounds prompt and reply of one session, in tokens."""

    id: str
    max_context: int


class Welcome(TypedDict):
    """The answer to `hello`. `heartbeat_ms`: send `ping` that often."""

    type: Literal["welcome"]
    connection_id: str
    server: Server
    limits: Limits
    models: list[Model]
    heartbeat_ms: int


class Ok(TypedDict):
    """A command was carried out.

    `session` answers create, update and fork; `message_id` (of the user's new message, if there is one), `response_id`,
    `head_seq` and `duplicate` answer `response.create`; `status` answers `response.cancel`: `cancelling`, or how the
    response had ended already.
    """

    type: Literal["ok"]
    id: str
    session: NotRequired[ListedSession]
    message_id: NotRequired[str]
    response_id: NotRequired[str]
    head_seq: NotRequired[int]
    duplicate: NotRequired[bool]
    status: NotRequired[str]


class Error(TypedDict):
    """A command was refused; without `id`, a session that is followed stands still: attach again if `retryable`."""

    type: Literal["error"]
    id: NotRequired[str]
    session_id: NotRequired[str]
    error: ErrorObject


class SessionAttached(TypedDict):
    """The session is followed from here: behind the cursor that was given, or behind the snapshot's `head_seq`.

    It answers `session.attach` in place of `ok`, and, without `id`, each entry of `hello.resume`.
    """

    type: Literal["session.attached"]
    id: NotRequired[str]
    session_id: str
    epoch: int
    head_seq: int
    mode: Literal["replay", "snapshot"]
    snapshot: NotRequired[Snapshot]


class Pong(TypedDict):
    """The answer to `ping`: its `t`, and the server's time in milliseconds."""

    type: Literal["pong"]
    t: float
    server_ts: int


class Goaway(TypedDict):
    """The server is about to end: running turns have `time_left_ms`; come back `reconnect_after_ms` after the close."""

    type: Literal["goaway"]
    reason: str
    time_left_ms: int
    reconnect_after_ms: int


class SessionsChanged(TypedDict):
    """The tenant's list of sessions is not what it was: fetch it again where it is shown."""

    type: Literal["sessions.changed"]


class _Logged(TypedDict):
    session_id: str
    seq: int
    ts: int


class SessionCreated(_Logged):
    """The first event of every session."""

    type: Literal["session.created"]
    session: Session


class SessionUpdated(_Logged):
    """Title, metadata, params, head, archived or pinned changed."""

    type: Literal["session.updated"]
    session: Session


class SessionDeleted(_Logged):
    """The session is gone; nothing follows."""

    type: Literal["session.deleted"]


class MessageCreated(_Logged):
    """A message of the user joined the tree."""

    type: Literal["message.created"]
    message: Message


class ResponseCreated(_Logged):
    """A response was accepted."""

    type: Literal["response.created"]
    response: Response


class ResponseInProgress(_Logged):
    """The prompt is computed: what was reused is known before the first token."""

    type: Literal["response.in_progress"]
    response_id: str
    usage: Usage
    queue_ms: float
    cache: Cache


class OutputTextDelta(_Logged):
    """More text of the reply, behind `offset` code points; with `seq_from`, in place of the events from there on."""

    type: Literal["response.output_text.delta"]
    seq_from: NotRequired[int]
    response_id: str
    offset: int
    delta: str


class OutputTextDone(_Logged):
    """The whole text, to check the deltas against."""

    type: Literal["response.output_text.done"]
    response_id: str
    text: str


class ResponseResumed(_Logged):
    """The response goes on after an interruption, from the code point given."""

    type: Literal["response.resumed"]
    response_id: str
    offset: int


class ResponseCompleted(_Logged):
    """Terminal: the reply ended by itself or at a stop string."""

    type: Literal["response.completed"]
    response: Response


class ResponseIncomplete(_Logged):
    """Terminal: the reply ran into a limit, named in `incomplete_details`."""

    type: Literal["response.incomplete"]
    response: Response


class ResponseCancelled(_Logged):
    """Terminal: cancelled; what was said so far is kept."""

    type: Literal["response.cancelled"]
    response: Response


class ResponseFailed(_Logged):
    """Terminal: it failed for the reason in `error`."""

    type: Literal["response.failed"]
    response: Response


CONNECTION_EVENTS: tuple[type, ...] = (Welcome, Ok, Error, SessionAttached, Pong, Goaway, SessionsChanged)
SESSION_EVENTS: tuple[type, ...] = (
    SessionCreated,
    SessionUpdated,
    SessionDeleted,
    MessageCreated,
    ResponseCreated,
    ResponseInProgress,
    OutputTextDelta,
    OutputTextDone,
    ResponseResumed,
    ResponseCompleted,
    ResponseIncomplete,
    ResponseCancelled,
    ResponseFailed,
)
