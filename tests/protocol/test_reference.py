"""The reference in docs/protocol.md: made from the code, complete, and true of what a server sends."""

from __future__ import annotations

import ast
import asyncio
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

from chatserve.client import ChatClient, CommandFailedError
from chatserve.client.link import FINAL_CLOSE_CODES as CLIENT_STOPS_AT
from chatserve.protocol import events, shapes
from chatserve.protocol.commands import Command
from chatserve.protocol.reference import CLOSE_CODES, ERROR_CODES, FINAL_CLOSE_CODES, reference
from chatserve.server.closing import CloseCode
from tests.live import LiveServer

ROOT = Path(__file__).parent.parent.parent
SHAPES = {
    TypeAdapter(shape).json_schema()["properties"]["type"]["const"]: TypeAdapter(shape)
    for shape in (*shapes.SESSION_EVENTS, *shapes.CONNECTION_EVENTS)
}


def check_shape(event: dict[str, Any]) -> None:
    """An event has the fields that its shape says, and no others: what a shape does not know it leaves out."""
    assert SHAPES[event["type"]].validate_python(event, strict=True) == event


def test_the_committed_reference_is_that_of_the_code() -> None:
    """Whoever changes a message runs bench/protocol_reference.py."""
    assert (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8") == reference()


def test_every_message_is_in_the_reference() -> None:
    """All commands, and an event for each builder of `events`."""
    headings = set(re.findall(r"^### `(.*)`$", reference(), re.MULTILINE))
    assert {cls.__dataclass_fields__["type"].default for cls in get_args(Command)} <= headings
    source = (ROOT / "chatserve" / "protocol" / "events.py").read_text(encoding="utf-8")
    built = set(re.findall(r'"type": "([a-z_.]+)"', source)) - {"text"}
    assert built == set(SHAPES)
    assert built >= events.TERMINAL_EVENTS


def test_links_lead_somewhere() -> None:
    """Every object that a table names has a section."""
    text = reference()
    anchors = {heading.lower() for heading in re.findall(r"^### (\w+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\(#(\w+)\)", text)) <= anchors


def test_close_codes_agree_with_server_and_client() -> None:
    """What the server closes with is in the table, and the client stays away just where the table says so."""
    assert {code.value for code in CloseCode} <= set(CLOSE_CODES)
    assert FINAL_CLOSE_CODES == CLIENT_STOPS_AT


def test_error_codes_agree_with_the_code() -> None:
    """Every code that an error is made with is in the table."""
    used = set()
    for path in (ROOT / "chatserve").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                used.add(node.value.value)
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "default_code":
                used.add(ast.literal_eval(node.value))
    assert {code for code in used if isinstance(code, str)} <= set(ERROR_CODES)


async def test_what_a_server_sends_is_as_the_reference_says(live_server: LiveServer) -> None:
    """Welcome, answers, snapshots and the events of turns, from a real server."""
    heard: list[dict[str, Any]] = []
    async with ChatClient(live_server.url) as client:
        session = await client.create_session(title="Shapes", metadata={"a": "b"}, params={"temperature": 0})
        check_shape(client.welcome)
        check_shape({"type": "ok", "id": "c1", "session": session})
        check_shape(await client.attach(session["id"], after_seq=0))
        await client.ask(session["id"], "Hello!")
        check_shape(await client.send(session["id"], "Count from 1 to 50.", max_output_tokens=5))  # its end comes below
        await client.update_session(session["id"], title="New")
        with pytest.raises(CommandFailedError) as refusal:
            await client.cancel(session["id"], "resp_none")
        check_shape({"type": "error", "id": "c1", "error": refusal.value.error})
        snapshot = await client.attach(session["id"])
        check_shape(snapshot)
        await client.attach(session["id"], epoch=session["epoch"], after_seq=0)
        check_shape(await client.command("session.detach", session_id="sess_other"))
        async with asyncio.timeout(20):
            expected = {"response.in_progress", "response.completed", "response.incomplete", "session.updated"}
            while not expected <= {event["type"] for event in heard}:
                heard.append(await client.next_event())
    for event in heard:
        check_shape(event)
