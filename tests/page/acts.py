"""What a person does on the page, and what they wait for."""

from __future__ import annotations

from playwright.async_api import Locator, Page, expect

from tests.page.conftest import TIMEOUT_MS

CAT = "My cat is called Momo."
LONG = 500  # tokens, which take some seconds
expect.set_options(timeout=TIMEOUT_MS)


def field(page: Page) -> Locator:
    """Where messages are written."""
    return page.get_by_label("Message", exact=True)


def replies(page: Page) -> Locator:
    """The replies on the screen."""
    return page.locator("article.assistant")


async def say(page: Page, text: str) -> None:
    """Write and send."""
    await field(page).fill(text)
    await page.get_by_role("button", name="Send").click()


async def begun(page: Page) -> None:
    """The only reply on the screen says something."""
    await expect(replies(page).locator(".prose")).not_to_be_empty()


async def done(page: Page, num_replies: int) -> None:
    """So many replies are on the screen, and none is running."""
    await expect(replies(page)).to_have_count(num_replies)
    await expect(replies(page).last.locator(".badge, .ending").first).to_be_visible()


async def choose(page: Page, menu: str, item: str) -> None:
    """Choose from a menu."""
    await page.get_by_role("button", name=menu).click()
    await page.get_by_role("menuitem", name=item, exact=True).click()


def plain(text: str) -> str:
    """Text as a browser may lay it out."""
    return " ".join(text.split())


async def shown(reply: Locator) -> str:
    """What a reply says on the screen."""
    return plain(await reply.locator(".prose").inner_text())
