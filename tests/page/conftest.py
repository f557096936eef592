"""A browser, and one live server with the bundled model, for all tests of the page: each takes seconds to start."""

from __future__ import annotations

import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright

from tests.live import LiveServer

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
TIMEOUT_MS = 8000
OpenPage = Callable[..., Awaitable[Page]]


class Home:
    """The live server, which a test may kill and start again where it was."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._server = LiveServer(data_dir).wait_ready()
        self.url = self._server.url

    def kill(self) -> None:
        """As a power cut would."""
        self._server.stop(signal.SIGKILL)

    def start_again(self) -> None:
        """On the same port, over the same data."""
        self._server = LiveServer(self._data_dir, f"--port={self.url.rpartition(':')[2]}").wait_ready()

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """An HTTP request that has to go well; returns the answer."""
        answer = httpx.request(method, self.url + path, json=body, trust_env=False)
        assert answer.is_success, answer.text
        return answer.json()

    def import_session(self, *texts: str, title: str = "Imported", state: str = "complete") -> str:
        """A session in which this was said in turns, the last of it as `state` says; returns its address."""
        roles = ["user", "assistant"] * len(texts)
        messages = [
            {"id": f"m{at}", "role": role, "text": text}
            for at, (role, text) in enumerate(zip(roles, texts, strict=False))
        ]
        for before, message in pairwise(messages):
            message["parent_id"] = before["id"]
        messages[-1]["state"] = state
        document = {"format": "chatserve.session", "version": 1, "model": {"id": "other", "vocab_size": 7}}
        body = {**document, "session": {"title": title}, "messages": messages}
        return self.address(self.ask("POST", "/v1/sessions/import", body)["id"])

    def long_session(self, num_tokens: int, title: str = "Long") -> str:
        """A session whose replies have so many tokens; returns its address."""
        params = {"ignore_eos": True, "max_output_tokens": num_tokens, "temperature": 0}
        return self.address(self.ask("POST", "/v1/sessions", {"title": title, "params": params})["id"])

    def address(self, session_id: str) -> str:
        """Where the page shows this session."""
        return f"{self.url}/#/s/{session_id}"

    def messages(self, address: str) -> list[dict[str, Any]]:
        """The messages of the session that an address of the page shows."""
        snapshot = self.ask("GET", f"/v1/sessions/{address.rpartition('/')[2]}")
        messages: list[dict[str, Any]] = snapshot["messages"]
        return messages

    def end_reply(self, address: str) -> None:
        """End the session's reply, if one is still running."""
        path = f"/v1/sessions/{address.rpartition('/')[2]}"
        if active := self.ask("GET", path)["active_response"]:
            self.ask("POST", f"{path}/responses/{active['id']}/cancel")


@pytest.fixture(scope="package")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """The server."""
    home = Home(tmp_path_factory.mktemp("page") / "data")
    yield home
    home.kill()  # its data is thrown away: no need to wait until it is saved


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def browser() -> AsyncIterator[Browser]:
    """A browser of this machine; the tests are skipped where there is none."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser on PATH: none of {', '.join(BROWSERS)}")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="package")
async def open_page(browser: Browser) -> AsyncIterator[OpenPage]:
    """Opens a page with a storage of its own. Errors in scripts and breaches of the policy fail the test."""
    contexts, problems = [], []

    async def open_page(url: str, **options: Any) -> Page:
        context = await browser.new_context(**options)
        contexts.append(context)
        page = await context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text) if "Content Security" in said.text else None)
        await page.goto(url)
        return page

    yield open_page
    for context in contexts:
        await context.close()
    assert problems == []
