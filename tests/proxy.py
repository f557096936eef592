"""A TCP proxy that breaks one connection at a message boundary of a WebSocket conversation and passes others on.

Told to, it falls silent: lines stay up and carry nothing, as where a network forgets its connections.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

Kind = Literal["cut", "reset", "stall", "delay", "lose", "torn"]
DELAY_S = 0.1
_LENGTH_BYTES = {126: 2, 127: 8}


@dataclass(frozen=True)
class Fault:
    """What happens once `after` messages have passed in either direction.

    The connection is `cut` or `reset` there, says nothing more (`stall`), or pauses (`delay`); or it is reset with the
    next message, which is not passed on (`lose`) or in part only (`torn`).
    """

    kind: Kind
    after: int


class Frames:
    """Bytes of one direction as what they carry: (bytes, whether they are a message). First the HTTP header.

    What follows a header that asks for no WebSocket is passed on as it comes.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._is_open = False
        self._is_plain = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bool]]:
        """What is whole by now."""
        self._buffer += data
        while size := self._next_size():
            unit = bytes(self._buffer[:size])
            del self._buffer[:size]
            yield unit, self._is_open and not self._is_plain and unit[0] & 0x0F in (1, 2)
            self._is_plain = self._is_plain or not (self._is_open or b"upgrade: websocket" in unit.lower())
            self._is_open = True

    def _next_size(self) -> int:
        """Bytes of the first unit in the buffer; 0 while it is not whole."""
        if not self._is_open:
            return self._buffer.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in self._buffer else 0
        if self._is_plain:
            return len(self._buffer)
        if len(self._buffer) < 2:
            return 0
        size = self._buffer[1] & 0x7F
        first = 2 + _LENGTH_BYTES.get(size, 0)
        if size in _LENGTH_BYTES:
            size = int.from_bytes(self._buffer[2:first], "big")
        whole = first + (4 if self._buffer[1] & 0x80 else 0) + size
        return whole if len(self._buffer) >= max(whole, first) else 0


class Line:
    """One connection through the proxy; `num_passed` messages have gone by."""

    def __init__(self, writers: list[asyncio.StreamWriter], fault: Fault | None) -> None:
        self.num_passed = 0
        self.fault = fault
        self._writers = writers
        self._may_pass = asyncio.Event()
        self._may_pass.set()

    def pause(self) -> None:
        """Carry nothing in either direction, and close nothing."""
        self._may_pass.clear()

    def go_on(self) -> None:
        """Carry what has come meanwhile, and what comes."""
        self._may_pass.set()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction, until it ends."""
        frames = Frames()
        while data := await reader.read(1 << 16):
            for unit, is_message in frames.feed(data):
                await self._may_pass.wait()
                await self._pass(unit, is_message, writer)
        writer.close()

    async def _pass(self, unit: bytes, is_message: bool, writer: asyncio.StreamWriter) -> None:
        due = self.fault is not None and is_message and self.num_passed == self.fault.after
        if due and self.fault and self.fault.kind in ("lose", "torn"):
            writer.write(unit[: len(unit) // 2] if self.fault.kind == "torn" else b"")
            await writer.drain()
            self.reset()
            return
        writer.write(unit)
        await writer.drain()
        self.num_passed += is_message
        if is_message and self.fault is not None and self.num_passed == self.fault.after:
            await self._break(self.fault.kind)

    async def _break(self, kind: Kind) -> None:
        if kind == "cut":
            for writer in self._writers:
                writer.close()
        elif kind == "reset":
            self.reset()
        elif kind == "stall":
            self.pause()
        elif kind == "delay":
            self.pause()
            await asyncio.sleep(DELAY_S)
            self.go_on()

    def reset(self) -> None:
        """End both sides with RST."""
        for writer in self._writers:
            if writer.transport.is_closing():
                continue
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()


class Proxy:
    """`async with Proxy(url, Fault("cut", 3)) as proxy`: talk to `proxy.url`. The first connection meets the fault."""

    def __init__(self, target_url: str, fault: Fault | None = None) -> None:
        host, _, port = target_url.removeprefix("http://").rpartition(":")
        self._target = host, int(port)
        self._fault = fault
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_dead: int | None = None
        self.lines: list[Line] = []
        self.url = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for line in self.lines:
            line.reset()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def silence(self) -> None:
        """The lines that are there never carry anything again, and new ones nothing for now."""
        self._num_dead = len(self.lines)
        for line in self.lines:
            line.pause()

    def heal(self) -> None:
        """New lines work, also those that were begun in the silence."""
        begun = self.lines[self._num_dead :]
        self._num_dead = None
        for line in begun:
            line.go_on()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, out = await asyncio.open_connection(*self._target)
        line = Line([writer, out], self._fault if not self.lines else None)
        self.lines.append(line)
        if self._num_dead is not None:
            line.pause()
        for source, sink in ((reader, out), (there, writer)):
            task = asyncio.create_task(self._carry(line, source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, line: Line, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await line.carry(reader, writer)
        except OSError:  # one side broke the line: so does the other
            line.reset()
