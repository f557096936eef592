"""What the end-to-end tests say to a server, and its processes by name."""

from __future__ import annotations

import asyncio
from typing import Any

import psutil

from chatserve.client import ChatClient
from tests.live import LiveServer


async def reply_to(client: ChatClient, session_id: str, text: str, **fields: Any) -> dict[str, Any]:
    """Say something in an attached session, greedily, and wait for the reply's end."""
    return await asyncio.wait_for(client.ask(session_id, text, temperature=0, **fields), 60)


async def new_session(client: ChatClient, **fields: Any) -> str:
    """A fresh session that the client follows; returns its id."""
    session = await client.create_session(**fields)
    await client.attach(session["id"])
    return str(session["id"])


def engine_of(server: LiveServer) -> psutil.Process:
    """The server's engine process."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(child for child in children if "chatserve.engine.process" in child.cmdline())
