"""`ChatClient`: sessions and turns over one connection that is kept up.

After a loss it comes back with full jitter, follows its sessions again from the last event applied, and sends commands
that were not answered once more, with the keys they had. It shows nothing and stores nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Self

from chatserve.client.address import base_urls
from chatserve.client.cursor import Cursor
from chatserve.client.errors import CommandFailedError, ConnectionEndedError
from chatserve.client.link import Link, LinkLostError, Patience
from chatserve.protocol.codec import Encoding
from chatserve.protocol.events import TERMINAL_EVENTS, Event

COMMAND_TIMEOUT_S = 60.0
MAX_QUEUED_EVENTS = 10_000
RETRY_ATTACH_S = 1.0
CLOSED_BY_US = 1000
_ANSWERS = frozenset({"ok", "error", "session.attached"})


@dataclass(slots=True)
class _Asked:
    """A command that waits for its answer."""

    message: Event
    answered: asyncio.Future[Event]
    was_repeated: bool = False


class ChatClient:
    """An asynchronous client: `async with ChatClient("http://127.0.0.1:8000") as client`.

    Commands return what the server answered, and raise CommandFailedError when it refused, TimeoutError after
    `command_timeout_s`, ConnectionEndedError when there is no server and trying again would not help. Everything else
    comes from `events`, which has to be read while sessions are attached: it holds `MAX_QUEUED_EVENTS`, then the
    connection waits.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        encoding: Encoding = "msgpack",
        command_timeout_s: float = COMMAND_TIMEOUT_S,
        patience: Patience = Patience(),  # noqa: B008 - frozen
    ) -> None:
        self._url = base_urls(url)[1]
        self._token = token
        self._encoding: Encoding = encoding
        self._command_timeout_s = command_timeout_s
        self._patience = patience
        self._link: Link | None = None
        self._runner: asyncio.Task[Any] | None = None
        self._cursors: dict[str, Cursor] = {}
        self._unanswered: dict[str, _Asked] = {}
        self._events: asyncio.Queue[Event] = asyncio.Queue(MAX_QUEUED_EVENTS)
        self._ids = itertools.count(1)
        self._pause_s = 0.0
        self._reattaching: set[asyncio.Task[None]] = set()
        self._replying: set[str] = set()  # sessions with a reply under way
        self.welcome: Event = {}

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def connect(self) -> None:
        """Connect for the first time; raises ConnectionEndedError at once if that fails."""
        try:
            link = await self._open()
        except LinkLostError as error:
            raise ConnectionEndedError(0, f"cannot connect to {error}") from None
        self._runner = asyncio.create_task(self._run(link), name="chat-client")

    async def close(self) -> None:
        """Leave; turns in progress go on without us."""
        for task in (*self._reattaching, self._runner):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._link is not None:
            await self._link.close()
            self._link = None

    async def create_session(self, **fields: Any) -> Event:
        """Make a session (`title`, `instructions`, `metadata`, `params`); returns it. It is not attached yet."""
        answer = await self.command("session.create", key=_new_key(), **fields)
        session: Event = answer["session"]
        return session

    async def attach(self, session_id: str, *, epoch: int | None = None, after_seq: int | None = None) -> Event:
        """Follow a session. Returns `session.attached`: with a snapshot, or followed by the events after the cursor."""
        return await self.command("session.attach", session_id=session_id, epoch=epoch, after_seq=after_seq)

    async def detach(self, session_id: str) -> None:
        """Follow a session no longer."""
        self._forget(session_id)
        await self.command("session.detach", session_id=session_id)

    async def update_session(self, session_id: str, **fields: Any) -> Event:
        """Change `title`, `metadata`, `params`, `head_id`, `archived` or `pinned`; returns the session."""
        answer = await self.command("session.update", session_id=session_id, **fields)
        session: Event = answer["session"]
        return session

    async def delete_session(self, session_id: str) -> None:
        """Delete a session with everything it holds."""
        self._forget(session_id)
        try:
            await self.command("session.delete", session_id=session_id)
        except CommandFailedError as refusal:
            if not (refusal.was_repeated and refusal.code == "session_not_found"):
                raise

    async def fork_session(self, session_id: str, at_message_id: str, **fields: Any) -> Event:
        """Make a session that begins like this one up to a message, perhaps with another `title`; returns it."""
        answer = await self.command(
            "session.fork", session_id=session_id, at_message_id=at_message_id, key=_new_key(), **fields
        )
        session: Event = answer["session"]
        return session

    async def send(self, session_id: str, text: str, **fields: Any) -> Event:
        """Say something; returns `ok` with `message_id`, `response_id` and `head_seq`. The reply comes in events."""
        return await self.respond(session_id, input=text, **fields)

    async def respond(self, session_id: str, **fields: Any) -> Event:
        """`response.create` with any of its fields: edit, regenerate, continue, sampling settings."""
        return await self.command("response.create", session_id=session_id, key=_new_key(), **fields)

    async def ask(self, session_id: str, text: str, **fields: Any) -> Event:
        """Say something in an attached session and wait for the reply's end; returns the response object.

        Events of this and other sessions that come meanwhile are dropped.
        """
        accepted = await self.send(session_id, text, **fields)
        async for event in self.events():
            if event["type"] in TERMINAL_EVENTS and event["response"]["id"] == accepted["response_id"]:
                response: Event = event["response"]
                return response
        raise AssertionError("unreachable: events() ends by raising")

    async def cancel(self, session_id: str, response_id: str) -> str:
        """End a reply early, keeping what it said; returns the response's status."""
        answer = await self.command("response.cancel", session_id=session_id, response_id=response_id)
        return str(answer["status"])

    async def command(self, name: str, **fields: Any) -> Event:
        """Send any command and wait for its answer; None fields are left out."""
        command_id = f"c{next(self._ids)}"
        message = {name: value for name, value in fields.items() if value is not None}
        message.update(type=name, id=command_id)
        asked = self._unanswered[command_id] = _Asked(message, asyncio.get_running_loop().create_future())
        try:
            await self._send(message)
            answer = await asyncio.wait_for(self._unless_ended(asked.answered), self._command_timeout_s)
        finally:
            del self._unanswered[command_id]
        if answer["type"] == "error":
            raise CommandFailedError(answer["error"], was_repeated=asked.was_repeated)
        return answer

    async def events(self) -> AsyncIterator[Event]:
        """Session and connection events in order, each session event once, until the connection ends for good.

        The client adds `client.disconnected` and `client.connected`. After a reconnect `session.attached` comes again;
        where it carries a snapshot, that replaces what was known of the session.
        """
        while True:
            yield await self.next_event()

    async def next_event(self) -> Event:
        """The next of `events`."""
        if not self._events.empty():
            return self._events.get_nowait()
        return await self._unless_ended(asyncio.ensure_future(self._events.get()))

    async def _unless_ended(self, wanted: asyncio.Future[Event]) -> Event:
        """What is wanted, or the exception that ended the connection."""
        if self._runner is None:
            raise ConnectionEndedError(0, "the client is not connected; use it as `async with`, or call connect()")
        ends: set[asyncio.Future[Any]] = {wanted, self._runner}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if wanted.done():
                return wanted.result()
        finally:
            wanted.cancel()
        error = None if self._runner.cancelled() else self._runner.exception()
        raise error or ConnectionEndedError(CLOSED_BY_US, "the client was closed")

    async def _send(self, message: Mapping[str, Any]) -> None:
        if self._link is not None:
            with contextlib.suppress(LinkLostError, ConnectionEndedError):  # the reader finds out, and sends it again
                await self._link.send(message)

    async def _open(self) -> Link:
        resume = [
            {"session_id": session_id, "epoch": cursor.epoch, "after_seq": cursor.seq}
            for session_id, cursor in self._cursors.items()
        ]
        link = await Link.open(
            self._url, encoding=self._encoding, token=self._token, resume=resume, patience=self._patience
        )
        self._link, self.welcome = link, link.welcome
        return link

    async def _run(self, link: Link) -> NoReturn:
        """Read for ever, over as many connections as it takes; ends by raising ConnectionEndedError."""
        while True:
            try:
                while True:
                    await self._receive(await link.receive(is_due=bool(self._replying or self._unanswered)))
            except LinkLostError as error:
                self._link = None
                await self._events.put({"type": "client.disconnected", "reason": str(error)})
            link = await self._reopen()
            await self._events.put({"type": "client.connected"})
            for asked in list(self._unanswered.values()):
                asked.was_repeated = True
                await self._send(asked.message)

    async def _reopen(self) -> Link:
        for attempt in itertools.count():
            pause_s, self._pause_s = self._pause_s, 0.0
            ceiling_s = min(self._patience.max_backoff_s, self._patience.first_backoff_s * 2 ** min(attempt, 10))
            await asyncio.sleep(pause_s + random.uniform(0, ceiling_s))
            with contextlib.suppress(LinkLostError):
                return await self._open()
        raise AssertionError("unreachable: count() does not end")

    async def _receive(self, event: Event) -> None:
        kind = event["type"]
        if kind == "session.attached":
            self._move_cursor(event)
        if kind == "goaway":
            self._pause_s = event["reconnect_after_ms"] / 1000
        if kind in _ANSWERS and event.get("id") in self._unanswered:
            answered = self._unanswered[event["id"]].answered
            if not answered.done():
                answered.set_result(event)
        elif "seq" in event:
            await self._receive_session_event(event)
        else:
            await self._events.put(event)
            self._follow_again_after(event)

    async def _receive_session_event(self, event: Event) -> None:
        cursor = self._cursors.get(event["session_id"])
        verdict = cursor.judge(event) if cursor else "drop"  # detached meanwhile
        if verdict == "apply":
            self._note_reply(event)
            await self._events.put(event)
        elif verdict == "gap":
            self._reattach(event["session_id"], delay_s=0.0)

    def _note_reply(self, event: Event) -> None:
        """Remember where a reply is under way: there the server should not be silent for long."""
        if event["type"] in TERMINAL_EVENTS or event["type"] == "session.deleted":
            self._replying.discard(event["session_id"])
        elif event["type"].startswith("response."):
            self._replying.add(event["session_id"])

    def _move_cursor(self, attached: Event) -> None:
        session_id = attached["session_id"]
        if attached["mode"] == "snapshot":
            self._replying.discard(session_id)
            if attached["snapshot"].get("active_response"):
                self._replying.add(session_id)
            self._cursors[session_id] = Cursor(attached["epoch"], attached["head_seq"])
        elif attached.get("id") in self._unanswered:
            asked = self._unanswered[attached["id"]].message
            after_seq = asked["after_seq"] if "after_seq" in asked else attached["head_seq"]
            self._cursors[session_id] = Cursor(attached["epoch"], after_seq)

    def _follow_again_after(self, event: Event) -> None:
        """An error about a session that answers no command means that the server stopped following it for us."""
        if event["type"] == "error" and event.get("session_id") in self._cursors and "id" not in event:
            if event["error"].get("retryable"):
                self._reattach(event["session_id"], delay_s=RETRY_ATTACH_S)
            else:
                self._forget(event["session_id"])

    def _forget(self, session_id: str) -> None:
        self._cursors.pop(session_id, None)
        self._replying.discard(session_id)

    def _reattach(self, session_id: str, delay_s: float) -> None:
        name = f"reattach-{session_id}"
        if any(task.get_name() == name for task in self._reattaching):
            return
        task = asyncio.create_task(self._attach_again(session_id, delay_s), name=name)
        self._reattaching.add(task)
        task.add_done_callback(self._reattaching.discard)

    async def _attach_again(self, session_id: str, delay_s: float) -> None:
        """Attach from the cursor, as often as it takes; a refusal that stays one ends the following."""
        attached: Event | None = None
        while attached is None and (cursor := self._cursors.get(session_id)):
            await asyncio.sleep(delay_s)
            delay_s = RETRY_ATTACH_S
            try:
                attached = await self.attach(session_id, epoch=cursor.epoch, after_seq=cursor.seq)
            except CommandFailedError as refusal:
                if not refusal.error.get("retryable"):
                    self._forget(session_id)
                    attached = {"type": "error", "session_id": session_id, "error": refusal.error}
        if attached is not None:
            await self._events.put(attached)


def _new_key() -> str:
    return secrets.token_hex(16)
