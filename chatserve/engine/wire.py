"""Framing between front end and engine: a 4-byte big-endian length, then one msgpack value.

`SyncChannel` is the engine's blocking end and `AsyncChannel` the front end's; both close cleanly on end of file.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from typing import Any

import msgpack

MAX_FRAME_BYTES = 256 * 1024 * 1024
RECEIVE_BYTES = 1 << 20
_HEADER = struct.Struct(">I")


class ChannelClosed(Exception):
    """The other process is gone."""


def pack_frame(message: Any) -> bytes:
    """One message as it travels; raises ValueError above `MAX_FRAME_BYTES`."""
    body: bytes = msgpack.packb(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes exceeds the {MAX_FRAME_BYTES} bytes one frame may hold")
    return _HEADER.pack(len(body)) + body


class SyncChannel:
    """The engine's end: `receive` returns whatever complete messages are there, `send` blocks until written."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()

    def receive(self, timeout_s: float | None) -> list[Any]:
        """All messages that have arrived; waits up to `timeout_s` (None: for ever) for the first byte.

        Raises ChannelClosed at end of file.
        """
        if not select.select([self._sock], [], [], timeout_s)[0]:
            return []
        self._read_available()
        return self._take_messages()

    def send(self, message: Any) -> None:
        """Write one message; raises ChannelClosed when nobody reads any more."""
        try:
            self._sock.sendall(pack_frame(message))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed from error

    def _read_available(self) -> None:
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except ConnectionResetError as error:
            raise ChannelClosed from error
        if not data:
            raise ChannelClosed
        self._buffer += data

    def _take_messages(self) -> list[Any]:
        messages, start = [], 0
        while len(self._buffer) - start >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer, start)
            end = start + _HEADER.size + length
            if len(self._buffer) < end:
                break
            messages.append(msgpack.unpackb(memoryview(self._buffer)[start + _HEADER.size : end]))
            start = end
        del self._buffer[:start]
        return messages


class AsyncChannel:
    """The front end's end: messages posted within one turn of the event loop travel as one frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._outbox: list[Any] = []

    def post(self, command: Any) -> None:
        """Queue one command for the frame that leaves at the end of this turn of the event loop."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(command)

    async def receive(self) -> Any:
        """The next message; raises ChannelClosed at end of file."""
        try:
            (length,) = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
            return msgpack.unpackb(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionResetError, BrokenPipeError) as error:
            raise ChannelClosed from error

    def close(self) -> None:
        """Close the socket; the engine exits on the end of file."""
        self._writer.close()

    def _flush(self) -> None:
        commands, self._outbox = self._outbox, []
        if not self._writer.is_closing():
            self._writer.write(pack_frame(commands))
