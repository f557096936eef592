"""A WebSocket connection that costs its process little, so that thousands of them do not measure themselves.

It knows just what this benchmark's server sends: whole, unmasked frames and no compression.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import msgpack

BINARY, CLOSE, PING = 0x2, 0x8, 0x9
HANDSHAKE = (
    "GET /v1/ws HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Protocol: chatserve.v1.msgpack\r\n\r\n"
)
Listener = Callable[[float, dict[str, Any]], None]


class Refused(Exception):
    """The server answered a command with an error."""


class Connection(asyncio.Protocol):
    """Says commands and gives every other event to `listener`, with the time at which it came (`time.perf_counter`)."""

    def __init__(self, host: str, listener: Listener) -> None:
        self._host = host
        self._listener = listener
        self._data = bytearray()
        self._is_open = False
        self._ids = itertools.count(1)
        self._answers: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._welcome: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    @classmethod
    async def open(cls, url: str, listener: Listener = lambda *_: None, receive_bytes: int | None = None) -> Connection:
        """Connect and say hello. `receive_bytes` bounds what the system takes for a reader that does not read."""
        address = urlsplit(url)
        raw = socket.socket()
        raw.setblocking(False)
        if receive_bytes is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(raw, (address.hostname, address.port))
        _, made = await loop.create_connection(lambda: cls(address.netloc, listener), sock=raw)
        await made._welcome
        return made

    async def ask(self, name: str, **fields: Any) -> dict[str, Any]:
        """Say a command and wait for its answer; raises Refused."""
        command_id = str(next(self._ids))
        answer = self._answers[command_id] = asyncio.get_running_loop().create_future()
        self.tell(name, id=command_id, **fields)
        event = await answer
        if event["type"] == "error":
            raise Refused(event["error"]["message"])
        return event

    async def new_session(self) -> str:
        """A session that this connection follows."""
        session = (await self.ask("session.create", key=uuid.uuid4().hex))["session"]
        await self.ask("session.attach", session_id=session["id"])
        return str(session["id"])

    async def say(self, session_id: str, num_output: int, input_ids: list[int]) -> str:
        """Begin a turn of so many tokens; the response's id."""
        answer = await self.ask(
            "response.create", session_id=session_id, key=uuid.uuid4().hex, max_output_tokens=num_output,
            input=[{"type": "token_ids", "token_ids": input_ids}], ignore_eos=True,
        )  # fmt: skip
        return str(answer["response_id"])

    def tell(self, name: str, **fields: Any) -> None:
        """Say a command. Clients mask their frames; a mask of zeros changes nothing."""
        payload = msgpack.packb({"type": name, **fields})
        size = len(payload)
        head = bytes([0x80 | BINARY, 0x80 | size]) if size < 126 else b"\x82\xfe" + size.to_bytes(2, "big")
        self._transport.write(head + bytes(4) + payload)

    def stop_reading(self) -> None:
        """Take nothing more from the socket."""
        self._transport.pause_reading()

    def close(self) -> None:
        """Cut the connection."""
        self._transport.abort()

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        self._transport = transport
        transport.write(HANDSHAKE.format(host=self._host).encode())

    def connection_lost(self, _: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        for waiting in (self._welcome, *self._answers.values()):
            if not waiting.done():
                waiting.set_exception(Refused("the connection was lost"))

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._data += data
        if not self._is_open and not self._take_handshake():
            return
        now_s, start = time.perf_counter(), 0
        while (end := self._take_frame(now_s, start)) is not None:
            start = end
        del self._data[:start]

    def _take_handshake(self) -> bool:
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return False
        if not self._data.startswith(b"HTTP/1.1 101"):
            raise Refused(self._data[:200].decode(errors="replace"))
        del self._data[: end + 4]
        self._is_open = True
        self.tell("hello", client={"name": "bench", "version": "1"})
        return True

    def _take_frame(self, now_s: float, start: int) -> int | None:
        """Hear the frame that begins at `start`, and say where it ends; None where it is not all there."""
        data, body = self._data, start + 2
        if len(data) < body:
            return None
        size = data[start + 1]
        if size >= 126:
            width = 2 if size == 126 else 8
            size, body = int.from_bytes(data[body : body + width], "big"), body + width
        if len(data) < body + size:
            return None
        self._hear(now_s, data[start] & 0xF, bytes(data[body : body + size]))
        return body + size

    def _hear(self, now_s: float, kind: int, payload: bytes) -> None:
        if kind == BINARY:
            self._route(now_s, msgpack.unpackb(payload))
        elif kind == CLOSE:
            self._transport.close()
        elif kind == PING:
            self._transport.write(bytes([0x8A, 0x80 | len(payload)]) + bytes(4) + payload)

    def _route(self, now_s: float, event: dict[str, Any]) -> None:
        answer = self._answers.pop(event.get("id", ""), None)
        if answer is not None:
            answer.set_result(event)
        elif event["type"] == "welcome":
            self._welcome.set_result(event)
        else:
            self._listener(now_s, event)
