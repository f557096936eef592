"""A session over `POST /v1/completions`: every turn sends the whole history as token ids, as a stateless client does.

HTTP is spoken by hand on an asyncio stream, because a general client costs more per token than the server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from load.turns import Turn

MAX_LINE_BYTES = 16 << 20


class RefusedError(Exception):
    """The server answered with an error."""


class CompletionSession:
    """One session on one connection, which is kept alive between turns."""

    def __init__(self, url: str, api_key: str | None, session: int) -> None:
        self._address = urlsplit(url)
        self._api_key = api_key
        self._session = session
        self._history: list[int] = []
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        """Connect; nothing else needs to be made."""
        host, port = self._address.hostname, self._address.port
        self._reader, self._writer = await asyncio.open_connection(host, port, limit=MAX_LINE_BYTES)

    async def take_turn(self, number: int, input_ids: list[int], num_output: int) -> Turn:
        """Say `input_ids` behind all that was said before."""
        prompt = self._history + input_ids
        turn = Turn(self._session, number, time.perf_counter(), num_input=len(prompt))
        generated: list[int] = []
        async for chunk in self._stream(_body(prompt, num_output)):
            _note(turn, chunk, generated)
        turn.ended_s = time.perf_counter()
        self._history = prompt + generated
        return turn

    async def close(self) -> None:
        """Close the connection."""
        if self._writer:
            self._writer.close()

    async def _stream(self, body: bytes) -> AsyncIterator[dict[str, Any]]:
        assert self._reader
        assert self._writer
        self._writer.write(self._head(len(body)) + body)
        head = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise RefusedError((head.split(b"\r\n", 1)[0] + b" " + await self._reader.read(1000)).decode())
        pending = b""
        while data := await self._chunk(self._reader):
            *lines, pending = (pending + data).split(b"\n\n")
            for line in lines:
                if line != b"data: [DONE]":
                    yield json.loads(line[6:])

    async def _chunk(self, reader: asyncio.StreamReader) -> bytes:
        size = int(await reader.readuntil(b"\r\n"), 16)
        return (await reader.readexactly(size + 2))[:-2]

    def _head(self, num_bytes: int) -> bytes:
        lines = [
            "POST /v1/completions HTTP/1.1",
            f"Host: {self._address.netloc}",
            "Content-Type: application/json",
            f"Content-Length: {num_bytes}",
            *([f"Authorization: Bearer {self._api_key}"] if self._api_key else []),
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _body(prompt: list[int], num_output: int) -> bytes:
    fields = {
        "prompt": prompt,
        "max_tokens": num_output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    return json.dumps(fields).encode()


def _note(turn: Turn, chunk: dict[str, Any], generated: list[int]) -> None:
    if "error" in chunk:
        raise RefusedError(chunk["error"]["message"])
    if usage := chunk.get("usage"):
        turn.num_output = usage["completion_tokens"]
        turn.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    for choice in chunk["choices"]:
        if token_ids := choice.get("token_ids"):
            turn.arrivals.append((time.perf_counter(), len(token_ids)))
            generated += token_ids
