"""Lines that drop, pages that are left and come back, a server that dies: nothing is lost or doubled in the browser."""

from __future__ import annotations

import asyncio

import pytest
from playwright.async_api import Page, expect

from tests.page.acts import CAT, LONG, begun, choose, done, field, plain, replies, say, shown
from tests.page.conftest import Home
from tests.proxy import Proxy

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="package")]
STORY = "Tell me a long story"
NOTICED_MS = 6000
OFFLINE_S = 20.0


async def lost(page: Page) -> None:
    """The page says that it lost the server."""
    await page.locator(".banner").wait_for(timeout=NOTICED_MS)
    await expect(page.locator(".banner")).to_contain_text("Connection lost")


async def back(page: Page, within_ms: float = 15_000) -> None:
    """The page found the server again."""
    await expect(page.locator(".banner")).to_have_count(0, timeout=within_ms)


async def same_story(home: Home, address: str, page: Page) -> None:
    """The page shows the story once and whole, as the server has it; where it is still told, it is ended."""
    home.end_reply(address)
    await done(page, 1)
    await expect(page.locator("article.user .said")).to_have_text([STORY])
    assert await shown(replies(page)) == plain(home.messages(address)[1]["content"][0]["text"])


async def test_reload_in_mid_answer(home: Home, open_page):
    """A reload while a reply streams goes on streaming it, and a draft is still there."""
    address = home.long_session(LONG)
    page = await open_page(address)
    await say(page, STORY)
    await begun(page)
    await field(page).fill("and then?")
    await page.reload()
    await expect(page.get_by_role("button", name="Stop")).to_be_visible()
    await expect(field(page)).to_have_value("and then?")
    await begun(page)
    await same_story(home, address, page)


async def test_two_tabs(home: Home, open_page):
    """Two pages on one session show the same, whichever of them one speaks in."""
    address = home.long_session(60)
    one, two = await open_page(address), await open_page(address)
    await expect(two.get_by_text("What is on your mind?")).to_be_visible()
    await say(one, "first")
    await done(two, 1)
    await say(two, "second")
    await done(one, 2)
    await expect(one.locator("article.user .said")).to_have_text(["first", "second"])
    await done(two, 2)
    assert await shown(replies(one).last) == await shown(replies(two).last)
    await choose(one, "Actions for this session", "Rename")
    await one.get_by_label("Title", exact=True).fill("Both")
    await one.keyboard.press("Enter")
    await expect(two.get_by_role("heading", level=1)).to_have_text("Both")


async def offline_in_mid_answer(home: Home, open_page) -> None:
    """A browser without a network for 20 s, in which the reply goes on; what is said meanwhile is said later."""
    address = home.long_session(6 * LONG)
    page = await open_page(address)
    await say(page, STORY)
    await begun(page)
    await page.context.set_offline(True)
    began_s = asyncio.get_running_loop().time()
    await lost(page)
    await field(page).fill("a draft")
    before = await shown(replies(page))
    await asyncio.sleep(began_s + OFFLINE_S - asyncio.get_running_loop().time())
    assert await shown(replies(page)) == before
    await page.context.set_offline(False)
    await back(page)
    await same_story(home, address, page)
    assert len(await shown(replies(page))) > len(before)
    await expect(field(page)).to_have_value("a draft")
    await page.context.set_offline(True)
    await say(page, "Are you there?")
    await expect(page.get_by_text("Sending…")).to_be_visible()
    await page.context.set_offline(False)
    await expect(replies(page)).to_have_count(2)
    await expect(page.locator("article.user .said")).to_have_text([STORY, "Are you there?"])
    await expect(field(page)).to_have_value("")
    home.end_reply(address)
    assert [message["role"] for message in home.messages(address)] == ["user", "assistant"] * 2


async def silent_in_mid_answer(home: Home, open_page) -> None:
    """A line that carries nothing any more, and no event says so, while a reply streams."""
    address = home.long_session(4 * LONG)
    async with Proxy(home.url) as proxy:
        page = await open_page(address.replace(home.url, proxy.url))
        await say(page, STORY)
        await begun(page)
        proxy.silence()
        await lost(page)
        before = await shown(replies(page))
        await asyncio.sleep(2)
        await expect(page.locator(".banner")).to_be_visible()
        proxy.heal()
        await back(page)
        await same_story(home, address, page)
        assert len(await shown(replies(page))) > len(before)


async def silent_while_idle(home: Home, open_page) -> None:
    """The same while nothing happens, but that somebody moves the pointer, or begins to write."""
    address = home.import_session(STORY, "Once upon a time.")
    async with Proxy(home.url) as proxy:
        page = await open_page(address.replace(home.url, proxy.url))
        await expect(replies(page)).to_be_visible()
        proxy.silence()
        await page.mouse.move(200, 300)
        await lost(page)
        proxy.heal()
        await back(page)
        proxy.silence()
        await field(page).press_sequentially(CAT)
        await lost(page)
        await field(page).press("Enter")
        await expect(page.get_by_text("Sending…")).to_be_visible()
        proxy.heal()
        await done(page, 2)
    await expect(page.locator("article.user .said")).to_have_text([STORY, CAT])
    assert [message["role"] for message in home.messages(address)] == ["user", "assistant"] * 2


async def test_lines_that_drop(home: Home, open_page):
    """The page says within seconds that its line is dead, and goes on where it was. Side by side: each takes 20 s."""
    await asyncio.gather(
        offline_in_mid_answer(home, open_page),
        silent_in_mid_answer(home, open_page),
        silent_while_idle(home, open_page),
    )


async def test_server_killed_in_mid_answer(home: Home, open_page):
    """A server that is killed and started again goes on with the reply, and the page with it; nothing is doubled."""
    address = home.long_session(4 * LONG)
    page = await open_page(address)
    await say(page, STORY)
    await begun(page)
    home.kill()
    await lost(page)
    before = await shown(replies(page))
    home.start_again()
    await field(page).fill("and then?")  # who writes does not wait for the next try
    await back(page)
    await expect(page.get_by_role("button", name="Stop")).to_be_visible(timeout=15_000)
    await same_story(home, address, page)
    await expect(replies(page).locator(".mark")).to_have_text("resumed")
    assert (await shown(replies(page))).startswith(before[:40])
    await page.reload()
    await expect(replies(page).locator(".mark")).to_have_text("resumed")
