"""Every view, in both themes and at two widths: looked at by axe, and kept as pictures in `test-results/page`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.async_api import Page, WebSocketRoute, expect

from chatserve.server.services import Timeouts
from chatserve.settings import load_settings
from tests.live import ROOT
from tests.page.acts import CAT, choose, field, say
from tests.page.conftest import Home
from tests.server.conftest import serving
from tests.server.fakes import FakeEngine

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="package")]
PICTURES = ROOT / "test-results" / "page"
AXE = (Path(__file__).parent / "data" / "axe.min.js").read_text()
WIDE_CODE = "def a_name_that_is_long(argument: str = 'a default that is longer than a phone is wide') -> None: ..."
RICH = (
    f"# Head\n\n> quote\n\n- [x] done\n\n{'A long paragraph. ' * 8}`{'identifier_' * 9}`\n\n"
    "| who | something rather long | another long column | number |\n| - | - | - | -: |\n"
    f"| Anna | some words here | {'https://example.com/' + 'path/' * 9} | 1,234 |\n\n```python\n{WIDE_CODE}\n```"
)
WIDTHS = {390: {"is_mobile": True, "has_touch": True}, 1280: {}}


@dataclass
class Line:
    """The page's line to the server, which can be cut as often as it is made."""

    is_cut: bool = False

    def __post_init__(self) -> None:
        self._routes: list[WebSocketRoute] = []

    async def lead(self, route: WebSocketRoute) -> None:
        """Connect the page, or refuse it."""
        self._routes.append(route)
        if self.is_cut:
            await route.close(code=1001)
        else:
            route.connect_to_server()

    async def cut(self) -> None:
        """End what there is, and whatever comes."""
        self.is_cut = True
        for route in self._routes:
            await route.close(code=1001)


async def go(page: Page, address: str) -> None:
    """To another session, as a link would."""
    await page.evaluate("address => { location.href = address }", address)


async def chat_views(home: Home, page: Page) -> AsyncIterator[str]:
    """What a conversation may look like."""
    yield "empty"
    title = "A session whose title says more than there is room for, wherever it is shown, here and in the list"
    await go(page, home.import_session("Show me all you can: " + "w" * 90, RICH, title=title))
    await expect(page.locator(".hljs-string")).to_be_visible()
    yield "markdown"
    await say(page, CAT)
    await expect(page.locator(".badge")).to_be_visible()
    await page.get_by_role("button", name="Answer again").last.click()
    await expect(page.locator(".versions")).to_contain_text("2/2")
    await page.get_by_role("button", name="Session memory").click()
    await page.locator(".badge summary").last.click()
    await expect(page.locator(".bar")).to_be_visible()
    yield "memory"
    await page.get_by_role("button", name="Session memory").click()
    await page.get_by_role("button", name="Edit message").last.click()
    yield "branches-edit"
    await page.keyboard.press("Escape")
    await field(page).fill("one word after another " * 900)
    await page.get_by_role("button", name="Send").click()
    await expect(page.get_by_role("alert")).to_contain_text("context")
    yield "refused"
    await field(page).fill("")


async def dialog_views(home: Home, page: Page) -> AsyncIterator[str]:
    """Menus and dialogs, and a reply that failed behind them."""
    await go(page, home.import_session("Hello?", "Well,", title="A failure", state="failed"))
    await expect(page.get_by_role("button", name="Try again")).to_be_visible()
    yield "failed"
    await page.get_by_role("button", name="Actions for this session").click()
    await expect(page.get_by_role("menuitem", name="Rename")).to_be_focused()
    yield "menu"
    await page.get_by_role("menuitem", name="Rename").click()
    yield "rename"
    await page.keyboard.press("Escape")
    await page.get_by_role("button", name="Settings").click()
    await expect(page.get_by_role("dialog")).to_be_visible()
    yield "settings"
    await page.keyboard.press("Escape")


async def show_sidebar(page: Page) -> None:
    """Where there is no room for it, it has to be called."""
    if show := await page.get_by_role("button", name="Show sessions").all():
        await show[0].click()
        await expect(page.get_by_role("link", name="New session")).to_be_focused()


async def other_views(home: Home, page: Page, line: Line) -> AsyncIterator[str]:
    """The list with its archive, what can be undone, the server's figures, and no server."""
    await choose(page, "Actions for this session", "Archive")
    await show_sidebar(page)
    await page.locator("#sessions summary").press("Enter")
    await page.locator("#sessions details li").last.scroll_into_view_if_needed()
    yield "archive"
    await page.get_by_role("searchbox").fill("no such words")
    yield "nothing-found"
    await page.get_by_role("searchbox").fill("")
    await page.get_by_role("link", name="Server").click()
    await expect(page.locator(".plot.disk strong")).to_contain_text("iB")
    yield "server"
    await page.go_back()
    await choose(page, "Actions for this session", "Delete")
    await expect(page.get_by_role("button", name="Undo")).to_be_visible()
    yield "deleted"
    await page.get_by_role("button", name="Undo").click()
    await expect(page.get_by_role("button", name="Try again")).to_be_visible()
    await line.cut()
    await expect(page.locator(".banner")).to_be_visible()
    yield "lost"


async def locked_view(page: Page, line: Line) -> AsyncIterator[str]:
    """A server that asks for a key."""
    async with serving(load_settings({"api_keys": ("alice=alices-key",)}), Timeouts(), FakeEngine()) as served:
        line.is_cut = False
        await page.goto(served.url)
        await page.evaluate(AXE)
        await expect(page.get_by_role("textbox", name="API key")).to_be_focused()
        yield "key"


async def views(home: Home, page: Page, line: Line) -> AsyncIterator[str]:
    """Brings every view on the screen, one after the other; gives its name."""
    for some in (
        chat_views(home, page),
        dialog_views(home, page),
        other_views(home, page, line),
        locked_view(page, line),
    ):
        async for name in some:
            yield name


async def faults(page: Page, name: str) -> list[str]:
    """What axe finds on the page as it is, and whether it is cut off sideways."""
    violations = (await page.evaluate("axe.run(document, {resultTypes: ['violations']})"))["violations"]
    found = [f"{name}: {each['id']}: {node['html']}" for each in violations for node in each["nodes"]]
    fits = await page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    return found if fits else [*found, f"{name}: wider than the page"]


async def look(home: Home, open_page, scheme: str, width: int) -> list[str]:
    """Keep a picture of each view; gives the faults of all."""
    line, found = Line(), []
    options = {"color_scheme": scheme, "reduced_motion": "reduce", "viewport": {"width": width, "height": 844}}
    page = await open_page("about:blank", **options, **WIDTHS[width])
    await page.route_web_socket("**/v1/ws", line.lead)
    await page.goto(home.url)
    await page.evaluate(AXE)
    async for name in views(home, page, line):
        await page.screenshot(path=PICTURES / f"{scheme}-{width}" / f"{name}.png")
        found += await faults(page, f"{scheme}-{width}/{name}")
    return found


async def test_looks(home: Home, open_page):
    """On every view axe finds nothing and nothing is cut off sideways. A picture of each is kept."""
    looks = [look(home, open_page, scheme, width) for scheme in ("light", "dark") for width in WIDTHS]
    found = await asyncio.gather(*looks)  # side by side: half of the time is waiting
    assert [fault for faults_of_look in found for fault in faults_of_look] == []
