"""The page in a real browser, with a real server and the bundled model."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Locator, Page, expect

from chatserve.server.services import Timeouts
from chatserve.settings import load_settings
from tests.page.conftest import TIMEOUT_MS, Home
from tests.server.conftest import serving
from tests.server.fakes import FakeEngine

# One browser, and so one event loop, for all of this module: starting a browser costs more than most tests here.
pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="module")]
AXE = (Path(__file__).parent / "data" / "axe.min.js").read_text()
CAT = "My cat is called Momo."
EVIL = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script><b>x</b>"
RICH = "# Head\n\n> quote\n\n| a | b |\n| - | - |\n| 1 | 2 |\n\n```python\nx = 'y' # z\n```"
LONG = 500  # tokens, which take some seconds
expect.set_options(timeout=TIMEOUT_MS)


def field(page: Page) -> Locator:
    return page.get_by_label("Message", exact=True)


def replies(page: Page) -> Locator:
    return page.locator("article.assistant")


async def say(page: Page, text: str) -> None:
    await field(page).fill(text)
    await page.keyboard.press("Enter")


async def done(page: Page, num_replies: int) -> None:
    """So many replies are on the screen, and none is running."""
    await expect(replies(page)).to_have_count(num_replies)
    await expect(replies(page).last.locator(".badge, .ending").first).to_be_visible()


async def choose(page: Page, menu: str, item: str) -> None:
    await page.get_by_role("button", name=menu).click()
    await page.get_by_role("menuitem", name=item, exact=True).click()


def plain(text: str) -> str:
    """Text as a browser may lay it out."""
    return " ".join(text.split())


async def shown(reply: Locator) -> str:
    return plain(await reply.locator(".prose").inner_text())


async def test_first_conversation(home: Home, open_page):
    """A message begins a session named after it, which recalls what was said, says what it reused and where it is."""
    page = await open_page(home.url)
    await expect(field(page)).to_be_focused()
    await page.get_by_role("button", name="My name is Alice and my cat is called Momo.").click()
    await page.keyboard.press("Enter")
    await done(page, 1)
    await expect(page.get_by_role("heading", level=1)).to_have_text("My name is Alice and my cat is called Momo.")
    assert re.search(r"#/s/sess_\w+$", page.url)
    await say(page, "What is my cat called?")
    await done(page, 2)
    await expect(replies(page).last).to_contain_text("Momo")
    await expect(replies(page).last.locator(".badge")).to_contain_text(
        re.compile(r"\d+ from device · .* to first token")
    )
    await expect(field(page)).to_have_value("")
    await expect(field(page)).to_be_focused()
    await page.get_by_role("button", name="Session memory").click()
    await expect(page.get_by_role("region", name="Session memory")).to_contain_text("On the device")


async def test_session_without_a_title(home: Home, open_page):
    """A session that was made elsewhere without a title is named after the first words said in it."""
    page = await open_page(home.long_session(4, title=""))
    await say(page, CAT)
    await expect(page.get_by_role("heading", level=1)).to_have_text(CAT)
    await expect(page.locator("#sessions a[aria-current=page]")).to_have_text(CAT)


async def test_stop_and_continue(home: Home, open_page):
    """Stop ends a reply and keeps what was said; Continue goes on behind it."""
    page = await open_page(home.long_session(LONG))
    await say(page, "Tell me a long story")
    await expect(replies(page).locator(".prose")).not_to_be_empty()
    await page.get_by_role("button", name="Stop").click()
    await expect(replies(page).locator(".ending")).to_have_text("Stopped")
    assert len(await shown(replies(page))) > 0
    await page.get_by_role("button", name="Continue").click()
    await expect(replies(page)).to_have_count(2)
    await page.get_by_role("button", name="Stop").click()
    await expect(page.get_by_role("button", name="Send")).to_be_visible()


async def test_edit_and_branches(home: Home, open_page):
    """An edited message is a branch beside the first one, and one can go from one to the other."""
    page = await open_page(home.url)
    await say(page, CAT)
    await done(page, 1)
    await page.locator("article.user").hover()
    await page.get_by_role("button", name="Edit message").click()
    await page.get_by_label("Edit your message").fill("My cat is called Bella.")
    await page.keyboard.press("Enter")
    await expect(page.locator("article.user .said")).to_have_text("My cat is called Bella.")
    await expect(page.locator("article.user .versions")).to_contain_text("2/2")
    await done(page, 1)
    await say(page, "What is my cat called?")
    await done(page, 2)
    await expect(replies(page).last).to_contain_text("Bella")
    await page.get_by_role("button", name="Version before").first.click()
    await expect(page.locator("article")).to_have_count(2)
    await expect(page.locator("article.user .said")).to_have_text(CAT)
    await page.get_by_role("button", name="Version after").click()
    await expect(page.locator("article")).to_have_count(4)


async def test_answer_again_and_fork(home: Home, open_page):
    """Another answer stands beside the first; a fork is a session that begins alike and goes its own way."""
    page = await open_page(home.url)
    await say(page, CAT)
    await done(page, 1)
    await page.get_by_role("button", name="Answer again").click()
    await expect(replies(page).locator(".versions")).to_contain_text("2/2")
    first = page.url
    await page.get_by_role("button", name="Fork from here").click()
    await page.wait_for_url(lambda url: url != first)
    await expect(page.get_by_role("heading", level=1)).to_have_text(f"{CAT} (fork)")
    await expect(page.locator("article")).to_have_count(2)
    await say(page, "What is my cat called?")
    await expect(replies(page).last).to_contain_text("Momo")
    await page.go_back()
    await expect(page.locator("article")).to_have_count(2)


async def test_sessions(home: Home, open_page):
    """Sessions are found by words, renamed, pinned, archived, deleted, and called back."""
    page = await open_page(home.long_session(4, "Zebra crossing"))
    listed = page.locator("#sessions")
    await choose(page, "Actions for this session", "Rename")
    await page.get_by_label("Title", exact=True).fill("Quagga")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", level=1)).to_have_text("Quagga")
    await page.get_by_role("searchbox").fill("quag")
    await expect(listed.locator("li")).to_have_count(1)
    await choose(page, "Actions for Quagga", "Pin")
    await expect(listed.get_by_role("list", name="Pinned")).to_contain_text("Quagga")
    await choose(page, "Actions for Quagga", "Archive")
    await expect(listed.locator("details")).to_contain_text("Archived (1)")
    await choose(page, "Actions for this session", "Delete")
    await expect(listed.locator("li")).to_have_count(0)
    await page.get_by_role("button", name="Undo").click()
    await expect(listed.locator("li")).to_have_count(1)
    await choose(page, "Actions for Quagga", "Delete")
    await page.goto("about:blank")  # leaving makes it final
    for _ in range(50):
        if not any(session["title"] == "Quagga" for session in home.ask("GET", "/v1/sessions?limit=200")["data"]):
            return
        await asyncio.sleep(0.05)
    pytest.fail("the session is still there")


async def test_export_and_import(home: Home, open_page, tmp_path):
    """What was exported as JSON comes back as a session; Markdown is for people."""
    page = await open_page(home.url)
    await say(page, CAT)
    await done(page, 1)
    async with page.expect_download() as download:
        await choose(page, "Actions for this session", "Export as JSON")
    path = tmp_path / "session.json"
    await (await download.value).save_as(path)
    assert (await download.value).suggested_filename == "My-cat-is-called-Momo-.json"
    before = page.url
    await page.locator("input[type=file]").set_input_files(path)
    await page.wait_for_url(lambda url: url != before)
    await expect(page.locator("article.user .said")).to_have_text(CAT)
    async with page.expect_download() as download:
        await choose(page, "Actions for this session", "Export as Markdown")
    await (await download.value).save_as(path)
    assert CAT in path.read_text()
    path.write_text(json.dumps({"format": "something else"}))
    await page.locator("input[type=file]").set_input_files(path)
    await expect(page.get_by_role("alert")).to_contain_text("this is not an exported session")


def document(text: str) -> dict[str, Any]:
    """An exported session in which a reply says this."""
    messages = [
        {"id": "a", "role": "user", "text": EVIL},
        {"id": "b", "parent_id": "a", "role": "assistant", "text": text},
    ]
    session = {"title": EVIL, "head_id": "b"}
    model = {"id": "other", "vocab_size": 7}
    return {"format": "chatserve.session", "version": 1, "model": model, "session": session, "messages": messages}


async def test_markdown_is_safe(home: Home, open_page):
    """Markdown is laid out, code has colours and a copy button; HTML of others stays text wherever it stands."""
    code = "```python\ndef f():\n    return 'x'\n```"
    text = (
        f"# Head\n\n- one\n- **two**\n\n{code}\n\n{EVIL}\n\n[link](javascript:alert(1)) ![pic](https://a.example/b.png)"
    )
    session = home.ask("POST", "/v1/sessions/import", document(text))
    page = await open_page(f"{home.url}/#/s/{session['id']}", permissions=["clipboard-read", "clipboard-write"])
    reply = replies(page)
    await expect(reply.locator("h1")).to_have_text("Head")
    await expect(reply.locator("li strong")).to_have_text("two")
    await expect(reply.locator(".hljs-keyword").first).to_have_text("def")
    await expect(reply).to_contain_text("<img src=x onerror=")
    await expect(page.locator("article.user .said")).to_have_text(EVIL)
    await expect(page.get_by_role("heading", level=1).first).to_have_text(EVIL)
    assert await page.locator("#app img, #app script, #app b, a[href^=javascript]").count() == 0
    await reply.get_by_role("button", name="Copy code").click()
    assert await page.evaluate("navigator.clipboard.readText()") == "def f():\n    return 'x'"
    assert "owned" not in (await page.title()).replace(EVIL, "")


async def test_settings(home: Home, open_page):
    """System prompt and sampling settings reach the session, and can be read there again."""
    page = await open_page(home.url)
    await page.get_by_role("button", name="Settings").click()
    await page.get_by_label("System prompt").fill("Be brief.")
    await page.get_by_label("Temperature").fill("0")
    await page.get_by_label("Longest reply").fill("3")
    await page.get_by_label("Stop strings").fill("END\nFIN")
    await page.get_by_role("button", name="Save").click()
    await say(page, CAT)
    await expect(replies(page).locator(".ending")).to_contain_text("reached the reply's length limit")
    session = home.ask("GET", f"/v1/sessions/{page.url.rpartition('/')[2]}")
    assert session["instructions"] == "Be brief."
    assert session["params"] == {"temperature": 0, "max_output_tokens": 3, "stop": ["END", "FIN"]}
    await page.get_by_role("button", name="Settings").click()
    await page.get_by_label("Longest reply").fill("")
    await page.get_by_role("button", name="Save").click()
    await expect(page.get_by_role("dialog")).to_have_count(0)
    session = home.ask("GET", f"/v1/sessions/{session['id']}")
    assert session["params"] == {"temperature": 0, "stop": ["END", "FIN"]}


async def test_reload_in_mid_answer(home: Home, open_page):
    """A reload while a reply streams goes on streaming it, and a draft is still there."""
    address = home.long_session(LONG)
    page = await open_page(address)
    await say(page, "Tell me a long story")
    await expect(replies(page).locator(".prose")).not_to_be_empty()
    await field(page).fill("and then?")
    await page.reload()
    await expect(page.get_by_role("button", name="Stop")).to_be_visible()
    await expect(field(page)).to_have_value("and then?")
    await done(page, 1)
    assert await shown(replies(page)) == plain(home.messages(address)[1]["content"][0]["text"])


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


async def test_offline_in_mid_answer(home: Home, open_page):
    """A browser that goes offline says so within 6 s and comes back; nothing of either side is lost or doubled."""
    address = home.long_session(4 * LONG)
    page = await open_page(address)
    await say(page, "Tell me a long story")
    await expect(replies(page).locator(".prose")).not_to_be_empty()
    await page.context.set_offline(True)
    await expect(page.locator(".banner")).to_contain_text("Connection lost", timeout=6000)
    await field(page).fill("a draft")
    await asyncio.sleep(1)
    await page.context.set_offline(False)
    await expect(page.locator(".banner")).to_have_count(0)
    await page.get_by_role("button", name="Stop").click()
    await done(page, 1)
    await expect(page.locator("article.user")).to_have_count(1)
    await expect(field(page)).to_have_value("a draft")
    assert await shown(replies(page)) == plain(home.messages(address)[1]["content"][0]["text"])
    await page.context.set_offline(True)
    await say(page, "Are you there?")
    await expect(page.get_by_text("Sending…")).to_be_visible()
    await page.context.set_offline(False)
    await expect(page.locator("article.user .said")).to_have_text(["Tell me a long story", "Are you there?"])
    await expect(field(page)).to_have_value("")
    assert [message["role"] for message in home.messages(address)] == ["user", "assistant"] * 2


async def test_keyboard_only(home: Home, open_page):
    """Everything is reached without a mouse: a message of two lines, the list, a menu, renaming, and back."""
    page = await open_page(home.url)
    await expect(field(page)).to_be_focused()
    await page.keyboard.press("Enter")  # says nothing
    await page.keyboard.type("one")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("two")
    await page.keyboard.press("Enter")
    await expect(page.locator("article.user .said")).to_have_text(re.compile("one\ntwo"))
    await done(page, 1)
    menu = page.get_by_role("button", name="Actions for this session")
    for _ in range(40):
        await page.keyboard.press("Shift+Tab")
        if await menu.evaluate("node => node === document.activeElement"):
            break
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("menuitem", name="Rename")).to_be_focused()
    await page.keyboard.press("ArrowUp")
    await expect(page.get_by_role("menuitem", name="Delete")).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(menu).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("menuitem", name="Rename")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.get_by_label("Title", exact=True)).to_be_focused()
    await page.keyboard.type("by hand")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", level=1)).to_have_text("by hand")


async def violations(page: Page, picture: Path) -> list[str]:
    """What axe finds on the page as it is, of which a picture is kept."""
    await page.screenshot(path=picture)
    found = await page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [f"{picture.stem}: {each['id']}: {node['html']}" for each in found["violations"] for node in each["nodes"]]


async def views(home: Home, page: Page) -> AsyncIterator[str]:
    """Brings every view on the screen, one after the other; gives its name."""
    yield "empty"
    session = home.ask("POST", "/v1/sessions/import", document(RICH))
    await page.evaluate(f"location.hash = '#/s/{session['id']}'")
    await expect(page.locator(".hljs-string")).to_be_visible()
    await say(page, CAT)
    await expect(page.locator(".badge").last).to_be_visible()
    await page.get_by_role("button", name="Session memory").click()
    await page.locator(".badge summary").last.click()
    yield "chat"
    await page.get_by_role("button", name="Actions for this session").click()
    yield "menu"
    await page.get_by_role("menuitem", name="Rename").click()
    yield "rename"
    await page.keyboard.press("Escape")
    await page.get_by_role("button", name="Settings").click()
    await expect(page.get_by_role("dialog")).to_be_visible()
    yield "settings"
    await page.keyboard.press("Escape")
    if show := await page.get_by_role("button", name="Show sessions").all():
        await show[0].click()
        yield "sidebar"
    await page.get_by_role("link", name="Server").click()
    await expect(page.locator(".plot")).to_have_count(11)
    yield "server"


MORE = pytest.mark.soak  # the other theme at the other width
LOOKS = [("light", 1280), ("dark", 390), pytest.param("dark", 1280, marks=MORE), pytest.param("light", 390, marks=MORE)]


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
async def test_accessibility(home: Home, open_page, scheme, width, tmp_path):
    """On every view axe finds nothing and nothing is cut off sideways. Pictures of all are left in `tmp_path`."""
    viewport = {"width": width, "height": 844}
    page = await open_page(home.url, color_scheme=scheme, reduced_motion="reduce", viewport=viewport)
    await page.evaluate(AXE)
    found = []
    async for name in views(home, page):
        found += await violations(page, tmp_path / f"{name}.png")
        assert await page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), name
    assert found == []


async def test_only_from_here(home: Home, open_page):
    """The first load asks this server only, and for no more than 120 KB."""
    page = await open_page("about:blank")
    answers = []
    page.on("response", lambda answer: answers.append(answer))
    await page.goto(home.url)
    await expect(page.locator(".model")).to_have_text("bundled")
    assert {answer.url.startswith(home.url) for answer in answers} == {True}
    assert sum([(await answer.request.sizes())["responseBodySize"] for answer in answers]) <= 120 * 1024


async def test_api_key(open_page):
    """With keys set the page asks for one, again after a wrong one, and remembers the right one for this tab."""
    async with serving(load_settings({"api_keys": ("alice=alices-key",)}), Timeouts(), FakeEngine()) as served:
        page = await open_page(served.url)
        key = page.get_by_role("textbox", name="API key")
        await key.fill("wrong-key")
        await page.keyboard.press("Enter")
        await expect(key).to_have_value("")
        await key.fill("alices-key")
        await page.keyboard.press("Enter")
        await expect(page.locator(".model")).to_have_text("fake-model")
        await page.reload()
        await expect(page.locator(".model")).to_have_text("fake-model")
        await say(page, "hello")
        await done(page, 1)
        served.sessions.fault = served.sessions.refusal("the context is full; start a new session")
        await say(page, "one more")
        await expect(page.get_by_role("alert")).to_have_text("the context is full; start a new session")
        await expect(field(page)).to_have_value("one more")
        await page.keyboard.type(".")
        await expect(page.get_by_role("alert")).to_be_visible()
        assert served.sessions.typed == ["sess_1"]


async def test_server_killed_in_mid_answer(home: Home, open_page):
    """A server that is killed and started again goes on with the reply, and the page with it; nothing is doubled."""
    address = home.long_session(4 * LONG)
    page = await open_page(address)
    await say(page, "Tell me a long story")
    await expect(replies(page).locator(".prose")).not_to_be_empty()
    home.kill()
    await expect(page.locator(".banner")).to_contain_text("Connection lost", timeout=6000)
    before = await shown(replies(page))
    home.start_again()
    await expect(page.locator(".banner")).to_have_count(0, timeout=15_000)
    await page.get_by_role("button", name="Stop").click(timeout=15_000)
    await done(page, 1)
    await expect(page.locator("article.user")).to_have_count(1)
    await expect(replies(page).locator(".mark")).to_have_text("resumed")
    text = await shown(replies(page))
    assert text == plain(home.messages(address)[1]["content"][0]["text"])
    assert text.startswith(before[:40])
