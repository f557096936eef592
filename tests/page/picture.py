"""Makes `docs/page.png`, the picture of the page in README. Run it by hand when the page looks different:

python -m tests.page.picture
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

import httpx
from playwright.async_api import async_playwright, expect

from tests.live import ROOT, LiveServer
from tests.page.acts import choose, done, say
from tests.page.conftest import BROWSERS

PICTURE = ROOT / "docs" / "page.png"
VIEWPORT = {"width": 1280, "height": 850}
OTHERS = (  # the oldest first
    ("Shopping list", "Add milk and eggs to my shopping list."),
    ("Anna's birthday", "My sister Anna lives in Bergen."),
    ("Counting to twenty", "Count from 1 to 20."),
    ("A name for the boat", "My boat is called Nimbus."),
    ("Favourite colours", "My favourite colour is teal."),
)
BEFORE = ("My dog is called Zorp.",)
NOW = ("I live in Oslo.", "What is my dog called?")


def fill(url: str) -> str:
    """Sessions with a turn each, and the one to be seen; returns its id."""
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as http:
        for title, *said in (*OTHERS, ("Zorp, my dog", *BEFORE)):
            session_id: str = http.post("/v1/sessions", json={"title": title}).json()["id"]
            for text in said:
                http.post(f"/v1/sessions/{session_id}/responses", json={"input": text, "temperature": 0})
    return session_id


async def take(url: str, session_id: str) -> None:
    """Go on with the session after the server's restart, and take the picture."""
    path = next(found for name in BROWSERS if (found := shutil.which(name)))
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = await browser.new_page(viewport=VIEWPORT, color_scheme="light", reduced_motion="reduce")
        await page.goto(f"{url}/#/s/{session_id}")
        await done(page, len(BEFORE))
        for number, text in enumerate(NOW, len(BEFORE) + 1):
            await say(page, text)
            await done(page, number)
        await choose(page, "Actions for Shopping list", "Pin")
        await page.get_by_role("button", name="Session memory").click()
        await expect(page.locator(".bar")).to_be_visible()
        await page.mouse.move(900, 500)
        await page.wait_for_timeout(3500)  # the memory is asked for once more
        await page.screenshot(path=PICTURE)
        await browser.close()


def main() -> None:
    """Talk, restart the server so that histories come from disk, and take the picture."""
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        server = LiveServer(data).wait_ready()
        session_id = fill(server.url)
        server.stop()
        server = LiveServer(data).wait_ready()
        try:
            asyncio.run(take(server.url, session_id))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
