"""How responsive the page stays while a long answer streams in: the longest task of its one thread, in milliseconds.

    python bench/page.py --url http://127.0.0.1:8000

The page comes from a running server, the answer from here, so that its length and pace do not depend on a model. Needs
Chromium (`chromium-headless-shell`, or what --browser names). Aim: no task over 200 ms.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from playwright.async_api import Page, WebSocketRoute, async_playwright

from chatserve.protocol.codec import encode, from_wire

SESSION = "sess_bench"
DELTA_CHARS = 24
PAUSE_S = 0.005
PARTS = {
    "markdown": "## A part\n\nSome *words* with `code` and **more** words, [a link](https://example.com).\n\n"
    "- one\n- two\n\n"
    "```python\ndef f(x):\n    return x + 1\n```\n\n| a | b |\n| - | - |\n| 1 | 2 |\n\n",
    "one paragraph": "Words that go **on** and `on`, without a *line* end. ",
    "one code block": "    value = compute(value)  # and so on\n",
}
OBSERVE = """window.tasks = []; new PerformanceObserver((list) => window.tasks.push(
    ...list.getEntries().map((entry) => entry.duration))).observe({type: "longtask"})"""
Event = dict[str, Any]


def answer_text(kind: str, num_characters: int) -> str:
    """So many characters of a kind of answer."""
    start = "```python\n" if kind == "one code block" else ""
    part = PARTS[kind]
    return (start + part * (num_characters // len(part) + 1))[:num_characters]


def snapshot() -> Event:
    """A session in which a reply has just begun."""
    content = [{"type": "text", "text": "Tell me everything."}]
    question = {"id": "m1", "role": "user", "content": content, "created_at": 0, "state": "complete"}
    reply = {"id": "r", "message_id": "m2", "parent_id": "m1", "model": "x", "status": "in_progress", "text": ""}
    session = {"id": SESSION, "title": "Bench", "instructions": "", "metadata": {}, "params": {}, "head_id": "m2"}
    context = {"used_tokens": 0, "max_tokens": 1, "left_tokens": 1}
    return {**session, "messages": [question], "active_response": reply, "context": context}


class Answering:
    """The server's side of one WebSocket: it greets, and streams its answer to who attaches."""

    def __init__(self, route: WebSocketRoute, text: str) -> None:
        self._route = route
        self._text = text
        self._streaming: asyncio.Task[None] | None = None
        route.on_message(self._receive)

    def _tell(self, **event: Any) -> None:
        self._route.send(encode(event, "msgpack"))

    def _receive(self, data: str | bytes) -> None:
        command = from_wire(data if isinstance(data, bytes) else data.encode())
        if command["type"] == "hello":
            self._tell(type="welcome", server={}, models=[], heartbeat_ms=15_000)
        elif command["type"] == "ping":
            self._tell(type="pong", t=command["t"], server_ts=0)
        elif command["type"] == "session.attach":
            place = {"id": command["id"], "session_id": SESSION, "epoch": 1, "head_seq": 1}
            self._tell(type="session.attached", mode="snapshot", snapshot=snapshot(), **place)
            self._streaming = asyncio.create_task(self._stream())

    async def _stream(self) -> None:
        starts = range(0, len(self._text), DELTA_CHARS)
        common = {"session_id": SESSION, "ts": 0, "response_id": "r", "type": "response.output_text.delta"}
        for seq, start in enumerate(starts, 2):
            self._tell(**common, seq=seq, offset=start, delta=self._text[start : start + DELTA_CHARS])
            await asyncio.sleep(PAUSE_S)
        response = {"id": "r", "message_id": "m2", "parent_id": "m1", "model": "x", "status": "completed"}
        seq = len(starts) + 2
        self._tell(
            type="response.completed", session_id=SESSION, seq=seq, ts=0, response={**response, "text": self._text}
        )


async def long_tasks(page: Page, url: str, text: str) -> list[float]:
    """Show the answer as it streams; returns the tasks over 50 ms, in milliseconds."""
    answering: list[Answering] = []
    await page.route_web_socket("**/v1/ws", lambda route: answering.append(Answering(route, text)))
    await page.add_init_script(OBSERVE)
    await page.goto(f"{url}/#/s/{SESSION}")
    await page.get_by_role("button", name="Answer again").wait_for(timeout=120_000)
    tasks: list[float] = await page.evaluate("window.tasks")
    return tasks


async def measure(url: str, browser_path: str, num_characters: int) -> None:
    """Print the figures of each kind of answer."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for kind in PARTS:
            page = await browser.new_page()
            tasks = await long_tasks(page, url, answer_text(kind, num_characters))
            longest = max(tasks, default=0)
            print(f"{kind}, {num_characters} characters: {len(tasks)} tasks over 50 ms, the longest {longest:.0f} ms")
            await page.close()
        await browser.close()


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--browser", default="/usr/bin/chromium-headless-shell", help="path of Chromium")
    parser.add_argument("--characters", type=int, default=20_000, help="length of the answer")
    given = parser.parse_args()
    asyncio.run(measure(given.url, given.browser, given.characters))


if __name__ == "__main__":
    main()
