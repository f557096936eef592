"""A real `chatserve serve` in a process of its own, to be talked to, killed and started again on the same data."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from chatserve.client import ChatClient

START_TIMEOUT_S = 60


class ServerProcess:
    """One life of a server. `url` is what its ready line said."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log = log

    @classmethod
    async def start(cls, data_dir: Path, *options: str) -> ServerProcess:
        """Start, on the bundled model unless the options name another; AssertionError with its log if it ends."""
        log = data_dir.parent / f"{data_dir.name}.log"
        command = (sys.executable, "-m", "chatserve", "serve", "--port", "0", "--data-dir", str(data_dir), *options)
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=stderr)
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
        if not line:
            raise AssertionError(f"status {await process.wait()}: {log.read_text()[-2000:]}")
        return cls(process, json.loads(line)["url"], log)

    async def get(self, path: str) -> httpx.Response:
        """An HTTP answer."""
        async with httpx.AsyncClient(base_url=self.url) as http:
            return await http.get(path)

    def child(self, text: str) -> psutil.Process:
        """The child process, at any depth, whose command line holds `text`."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if any(text in word for word in child.cmdline()))

    def kill(self) -> None:
        """kill -9 of the front end alone; its children must follow by themselves."""
        self.process.kill()

    async def stop(self, timeout_s: float = 25) -> tuple[int, bytes]:
        """SIGTERM; returns the exit status and what else it wrote on stdout."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        assert self.process.stdout is not None
        rest = await asyncio.wait_for(self.process.stdout.read(), timeout_s)
        return await asyncio.wait_for(self.process.wait(), timeout_s), rest


@contextlib.asynccontextmanager
async def serving(data_dir: Path, *options: str) -> AsyncIterator[ServerProcess]:
    """A server for the length of the block."""
    server = await ServerProcess.start(data_dir, *options)
    try:
        yield server
    finally:
        await server.stop()


async def reply_to(client: ChatClient, session_id: str, text: str, **fields: Any) -> dict[str, Any]:
    """Say something in an attached session, greedily, and wait for the reply's end."""
    return await asyncio.wait_for(client.ask(session_id, text, temperature=0, **fields), 60)


async def new_session(client: ChatClient, **fields: Any) -> str:
    """A fresh session that the client follows; returns its id."""
    session = await client.create_session(**fields)
    await client.attach(session["id"])
    return str(session["id"])
