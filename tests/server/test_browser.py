"""The page in a real browser, against the real surfaces over doubles."""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect

from chatserve.server.services import Timeouts
from chatserve.settings import load_settings
from tests.server.conftest import Served, serving
from tests.server.fakes import FakeEngine

# One browser, and so one event loop, for all of this module: starting a browser costs more than most tests here.
pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="module")]
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """A browser of this machine; the tests are skipped where there is none."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser on PATH: none of {', '.join(BROWSERS)}")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def served() -> AsyncIterator[Served]:
    """A server with default settings and no keys, in the browser's loop."""
    async with serving(load_settings(), Timeouts(), FakeEngine()) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def open_page(browser: Browser) -> AsyncIterator[Callable[..., Awaitable[Page]]]:
    """Opens the page at a URL, each time with a storage of its own; an error in its scripts fails the test."""
    pages, problems = [], []

    async def open_page(url: str, **options: object) -> Page:
        page = await browser.new_page(**options)
        pages.append(page)
        page.set_default_timeout(5000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        await page.goto(url)
        return page

    yield open_page
    for page in pages:
        await page.close()
    assert problems == []


async def say(page: Page, text: str) -> None:
    await page.get_by_label("Message", exact=True).fill(text)
    await page.keyboard.press("Enter")


async def test_conversation(served, open_page):
    """A message makes a session, its reply streams in with what it cost, and a reload finds it again."""
    page = await open_page(served.url)
    await say(page, "my dog is Zorp")
    await expect(page.locator("article.user p")).to_have_text("my dog is Zorp")
    await expect(page.locator("article.assistant p")).to_have_text("my dog is Zorp")
    await expect(page.locator("article.assistant footer")).to_have_text(
        "12 of 20 input tokens cached · first token 5 ms · 222 tokens/s"
    )
    await expect(page.get_by_role("heading", name="my dog is Zorp")).to_be_visible()
    assert page.url.endswith("#sess_1")
    await expect(page.locator("#memory")).to_have_text("history: 12 on the device, 8 on disk")
    await say(page, "and now?")
    await expect(page.locator("article")).to_have_count(4)


async def test_text_stays_text(served, open_page):
    """HTML in a message, a reply or a title is shown as it was written."""
    evil = "<img src=x onerror=document.title='owned'><b>x</b>"
    page = await open_page(served.url)
    await say(page, evil)
    await expect(page.locator("article.assistant p")).to_have_text(evil)
    await expect(page.locator("#sessions button")).to_contain_text("<img src=x")
    assert await page.locator("#messages img, #messages b, #sessions img").count() == 0
    assert "owned" not in re.sub(r"<.*", "", await page.title())


async def test_stop(served, open_page):
    """While a reply runs there is Stop in place of Send; it ends the reply and keeps what was said."""
    page = await open_page(served.url)
    await say(page, "wait")
    await expect(page.locator("article.assistant p")).to_have_text("wait ")
    await expect(page.get_by_role("button", name="Send")).to_be_hidden()
    await page.get_by_role("button", name="Stop").click()
    await expect(page.locator("article.assistant footer")).to_contain_text("stopped")
    await expect(page.get_by_role("button", name="Send")).to_be_visible()


async def test_sessions(served, open_page):
    """Create, rename, switch and delete sessions; one made elsewhere appears by itself."""
    page = await open_page(served.url)
    await say(page, "first")
    await expect(page.locator("article")).to_have_count(2)
    await page.get_by_role("button", name="New session").first.click()
    await expect(page.locator("#sessions li")).to_have_count(2)
    await expect(page.locator("article")).to_have_count(0)
    await page.get_by_role("button", name="Rename").click()
    await page.get_by_label("Title").fill("second")
    await page.keyboard.press("Enter")
    await expect(page.locator("#title")).to_have_text("second")
    async with served.http() as http:
        await http.post("/v1/sessions", json={"title": "from elsewhere"})
    await expect(page.locator("#sessions")).to_contain_text("from elsewhere")
    await page.get_by_role("button", name="first").click()
    await expect(page.locator("#title")).to_have_text("first")
    await page.get_by_role("button", name="Delete").click()
    await page.locator("#dialog-ok").click()
    await expect(page.locator("#sessions")).not_to_contain_text("first")
    assert len(served.sessions.views) == 2


async def test_comes_back(served, open_page):
    """A lost connection is shown and mended; what was said meanwhile arrives once."""
    page = await open_page(served.url)
    await say(page, "wait")
    await expect(page.locator("article.assistant p")).to_have_text("wait ")
    await served.services.hub.close_all(1012, "restart", 2.0)
    response_id = next(iter(served.sessions.running))
    await served.sessions.append(
        "sess_1",
        {"type": "response.output_text.delta", "response_id": response_id, "offset": 5, "delta": "longer"},
    )
    await expect(page.locator("article.assistant p")).to_have_text("wait longer")
    await expect(page.locator("#connection")).to_have_attribute("data-state", "open")


async def test_server_away(served, open_page):
    """While there is no connection the page says so."""
    page = await open_page(served.url)
    await say(page, "hello")
    await expect(page.locator("article")).to_have_count(2)
    served.services.hub.begin_drain(0)  # lets nobody in
    await served.services.hub.close_all(1012, "restart", 2.0)
    await expect(page.locator("#connection")).to_contain_text(re.compile("lost|connecting"))
    await expect(page.locator("article")).to_have_count(2)


@pytest_asyncio.fixture(loop_scope="module")
async def served_with_key() -> AsyncIterator[Served]:
    """A server that wants a key."""
    async with serving(load_settings({"api_keys": ("alice=alices-key",)}), Timeouts(), FakeEngine()) as served:
        yield served


async def test_api_key(served_with_key, open_page):
    """With keys set the page asks for one, again after a wrong one, and remembers the right one for this tab."""
    page = await open_page(served_with_key.url)
    field = page.get_by_role("textbox", name="API key")
    await field.fill("wrong-key")
    await page.keyboard.press("Enter")
    await expect(field).to_have_value("")
    await field.fill("alices-key")
    await page.keyboard.press("Enter")
    await expect(page.locator("#server")).to_contain_text("fake-model")
    await say(page, "hello")
    await expect(page.locator("article")).to_have_count(2)
    await page.reload()
    await expect(page.locator("#server")).to_contain_text("fake-model")
    assert await page.locator("dialog[open]").count() == 0


async def test_refusal_is_shown(served, open_page):
    """What the server refuses is said on the page, and what was typed is not lost."""
    page = await open_page(served.url)
    await say(page, "hello")
    await expect(page.locator("article")).to_have_count(2)
    served.sessions.fault = served.sessions.refusal("the context is full; start a new session")
    await say(page, "one more")
    await expect(page.get_by_role("alert")).to_have_text("the context is full; start a new session")
    await expect(page.locator("#title")).to_have_text("hello")
    await expect(page.get_by_label("Message", exact=True)).to_have_value("one more")


async def test_keyboard(served, open_page):
    """Shift+Enter starts a new line, Enter sends both, an empty message is not sent."""
    page = await open_page(served.url)
    field = page.get_by_label("Message", exact=True)
    await expect(field).to_be_focused()
    await page.keyboard.press("Enter")
    await page.keyboard.type("one")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("two")
    await page.keyboard.press("Enter")
    await expect(page.locator("article.user p")).to_have_text(re.compile("one\ntwo"))
    await expect(field).to_have_value("")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_phone(served, open_page, scheme):
    """On a phone nothing is cut off sideways, and the sessions are behind a button."""
    page = await open_page(served.url, viewport={"width": 360, "height": 640}, color_scheme=scheme)
    await say(page, "w" * 200)
    await expect(page.locator("article")).to_have_count(2)
    assert await page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    await expect(page.locator("#sidebar")).to_be_hidden()
    await page.get_by_role("button", name="Show sessions").click()
    await expect(page.locator("#sessions button")).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(page.locator("#sidebar")).to_be_hidden()
    served.services.hub.begin_drain(0)
    await served.services.hub.close_all(1012, "restart", 2.0)
    await expect(page.locator("#connection")).to_be_visible()
    assert await page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")


async def test_everything_has_a_name(served, open_page):
    """Each control says what it is to those who do not see it."""
    page = await open_page(served.url)
    await say(page, "hello")
    await expect(page.locator("article")).to_have_count(2)
    unnamed = await page.evaluate(
        """[...document.querySelectorAll("button, input, textarea, nav, aside, [role=log]")]
            .filter((node) => node.checkVisibility())
            .filter((node) => !(node.ariaLabel || node.textContent.trim() || node.labels?.[0]?.textContent.trim()))
            .map((node) => node.outerHTML)"""
    )
    assert unnamed == []
