"""Sessions over the WebSocket protocol `chatserve.v1`: a turn sends its new token ids only.

Deltas carry text, so the tokens of each are taken to be its share of the reply's characters.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from typing import Any

import msgpack
from websockets.asyncio.client import ClientConnection, connect

from load.over_completions import RefusedError
from load.turns import Turn

TERMINAL = ("response.completed", "response.incomplete", "response.cancelled", "response.failed")
MAX_MESSAGE_BYTES = 64 << 20


class WsConnection:
    """One welcomed connection that several sessions share."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url.replace("http", "ws", 1) + "/v1/ws"
        self._api_key = api_key
        self._socket: ClientConnection | None = None
        self._reading: asyncio.Task[None] | None = None
        self._ids = itertools.count(1)
        self._answers: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._events: dict[str, asyncio.Queue[tuple[float, dict[str, Any]]]] = {}

    async def open(self) -> None:
        """Connect and say hello."""
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else None
        self._socket = await connect(
            self._url, subprotocols=["chatserve.v1.msgpack"], additional_headers=headers, compression=None,
            max_size=MAX_MESSAGE_BYTES, proxy=None, ping_interval=None,
        )  # fmt: skip
        client = {"name": "multiturn", "version": "1"}
        await self._socket.send(msgpack.packb({"type": "hello", "client": client}))
        self._reading = asyncio.create_task(self._read(self._socket))

    async def command(self, name: str, **fields: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises RefusedError."""
        assert self._socket
        command_id = str(next(self._ids))
        answer = self._answers[command_id] = asyncio.get_running_loop().create_future()
        await self._socket.send(msgpack.packb({"type": name, "id": command_id, **fields}))
        event = await answer
        if event["type"] == "error":
            raise RefusedError(event["error"]["message"])
        return event

    def key(self) -> str:
        """An idempotency key that was not used before."""
        return uuid.uuid4().hex

    def events_of(self, session_id: str) -> asyncio.Queue[tuple[float, dict[str, Any]]]:
        """The session's events with the times at which they came; ask before attaching."""
        return self._events.setdefault(session_id, asyncio.Queue())

    async def close(self) -> None:
        """Close the socket."""
        if self._socket:
            await self._socket.close()
        if self._reading:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self, socket: ClientConnection) -> None:
        try:
            async for data in socket:
                self._route(time.perf_counter(), msgpack.unpackb(data))
        finally:
            for answer in self._answers.values():
                answer.cancel()
            for events in self._events.values():
                events.put_nowait((time.perf_counter(), {"type": "error", "error": {"message": "connection lost"}}))

    def _route(self, now_s: float, event: dict[str, Any]) -> None:
        answer = self._answers.pop(event.get("id", ""), None)
        if answer:
            answer.set_result(event)
        elif event.get("session_id") in self._events:
            self._events[event["session_id"]].put_nowait((now_s, event))


class WsSession:
    """One session on a connection; `open` makes and follows it, `attach` goes on with one that there is."""

    def __init__(self, connection: WsConnection, session: int) -> None:
        self.session_id = ""
        self.number = session
        self._connection = connection

    async def open(self) -> None:
        """Make the session and follow it."""
        created = await self._connection.command("session.create", key=self._connection.key())
        await self.attach(created["session"]["id"])

    async def attach(self, session_id: str) -> None:
        """Follow a session."""
        self.session_id = session_id
        self._events = self._connection.events_of(session_id)
        await self._connection.command("session.attach", session_id=session_id)

    async def take_turn(self, number: int, input_ids: list[int], num_output: int) -> Turn:
        """Say `input_ids`; the server has the rest."""
        turn = Turn(self.number, number, time.perf_counter())
        await self._connection.command(
            "response.create",
            session_id=self.session_id,
            key=self._connection.key(),
            input=[{"type": "token_ids", "token_ids": input_ids}],
            max_output_tokens=num_output,
            temperature=0.0,
            ignore_eos=True,
        )
        deltas: list[tuple[float, int]] = []
        while not turn.ended_s:
            _note(turn, deltas, *await self._events.get())
        num_chars = sum(chars for _, chars in deltas)
        turn.arrivals = [(at_s, turn.num_output * chars / num_chars) for at_s, chars in deltas]
        return turn

    async def detach(self) -> None:
        """Follow the session no longer: a connection follows a limited number."""
        await self._connection.command("session.detach", session_id=self.session_id)

    async def close(self) -> None:
        """Leave the session; its connection is closed by whoever opened it."""


def _note(turn: Turn, deltas: list[tuple[float, int]], at_s: float, event: dict[str, Any]) -> None:
    kind = event["type"]
    if kind == "response.output_text.delta":
        deltas.append((at_s, len(event["delta"])))
    elif kind == "error" or kind == "response.failed":
        raise RefusedError((event.get("error") or event["response"]["error"])["message"])
    elif kind in TERMINAL:
        usage = event["response"]["usage"]
        turn.ended_s, turn.num_output, turn.num_input = at_s, usage["output_tokens"], usage["input_tokens"]
        turn.num_cached = usage["input_tokens_details"]["cached_tokens"]
        sources = usage.get("cached_tokens_details", {})
        turn.num_restored = sum(sources.get(tier, 0) for tier in ("host", "disk"))
        turn.restore_ms = event["response"]["timings"]["restore_ms"]
