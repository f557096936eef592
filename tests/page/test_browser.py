"""The page in a real browser, with a real server and the bundled model."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from playwright.async_api import Page, expect

from chatserve.server.services import Timeouts
from chatserve.settings import load_settings
from tests.page.acts import CAT, LONG, begun, choose, done, field, replies, say, shown
from tests.page.conftest import Home
from tests.server.conftest import serving
from tests.server.fakes import FakeEngine

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="package")]
EVIL = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script><b>x</b>"


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
    badge = replies(page).last.locator(".badge")
    await expect(badge).to_contain_text(re.compile(r"\d+ of \d+ from device · .* to first token"))
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
    await begun(page)
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
    await page.get_by_role("searchbox").fill("")
    await expect(listed.get_by_role("link", name="Quagga")).to_be_hidden()
    await listed.locator("summary").click()
    home.ask("POST", "/v1/sessions", {"title": "Okapi"})
    await expect(listed).to_contain_text("Okapi")
    await expect(listed.get_by_role("link", name="Quagga")).to_be_visible()  # an open archive stays open
    said = home.ask("POST", "/v1/sessions", {"title": "Okapi"})["id"]
    home.ask("POST", f"/v1/sessions/{said}/responses", {"input": "My aardvark is called Zorp."})
    await page.get_by_role("searchbox").fill("AARDVARK zorp")
    await expect(listed.locator("li")).to_have_count(1)
    await expect(listed.get_by_role("link", name="Okapi")).to_be_visible()
    await page.get_by_role("searchbox").fill("quag")
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


async def test_markdown_is_safe(home: Home, open_page):
    """Markdown is laid out, code has colours and a copy button; HTML of others stays text wherever it stands."""
    code = "```python\ndef f():\n    return 'x'\n```"
    text = (
        f"# Head\n\n- one\n- **two**\n\n{code}\n\n{EVIL}\n\n[link](javascript:alert(1)) ![pic](https://a.example/b.png)"
    )
    page = await open_page(
        home.import_session(EVIL, text, title=EVIL), permissions=["clipboard-read", "clipboard-write"]
    )
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
    await page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as over plain HTTP
    await page.locator("article.user").get_by_role("button", name="Copy message").click()
    await field(page).focus()
    await page.keyboard.press("Control+V")
    await expect(field(page)).to_have_value(EVIL)
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
    await expect(menu).to_be_focused()
    await page.keyboard.press("Shift+Tab")
    await expect(page.get_by_role("button", name="Settings")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.get_by_label("Temperature")).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("button", name="Settings")).to_be_focused()
    await page.keyboard.press("Control+K")
    await expect(page.get_by_role("searchbox")).to_be_focused()
    await page.keyboard.press("Control+Shift+O")
    await expect(page.get_by_role("heading", level=1)).to_have_text("New session")
    await expect(field(page)).to_be_focused()


async def test_edit_by_arrow(home: Home, open_page):
    """Arrow up in the empty field takes up what was said last; Escape leaves it as it was, Enter says it anew."""
    page = await open_page(home.url)
    await say(page, CAT)
    await done(page, 1)
    await page.keyboard.press("ArrowUp")
    await expect(page.get_by_label("Edit your message")).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(page.locator("article.user .said")).to_have_text(CAT)
    await expect(field(page)).to_be_focused()
    await page.keyboard.press("ArrowUp")
    await page.keyboard.press("End")
    await page.keyboard.type(" And I live in Oslo.")
    await page.keyboard.press("Enter")
    await expect(page.locator("article.user .said")).to_have_text(f"{CAT} And I live in Oslo.")
    await done(page, 1)
    await expect(field(page)).to_be_focused()


async def to_end(page: Page) -> float:
    """How many pixels of the log are below what is seen."""
    distance: float = await page.locator("#messages").evaluate("it => it.scrollHeight - it.scrollTop - it.clientHeight")
    return distance


async def test_scrolling_yields(home: Home, open_page):
    """The log follows a reply that grows, lets go of who scrolls up ever so little, and is called back by a button."""
    address = home.long_session(3 * LONG)
    page = await open_page(address, viewport={"width": 390, "height": 360})
    latest = page.get_by_role("button", name="To the latest message")
    await say(page, "Count from 1 to 200.")
    await page.wait_for_function("() => document.querySelector('#messages').scrollTop > 60")
    assert await to_end(page) < 80
    await page.locator("#messages").hover()
    await page.mouse.wheel(0, -30)
    await expect(latest).to_be_visible()
    seen = await page.locator("#messages").evaluate("it => it.scrollTop")
    length = len(await shown(replies(page)))
    await page.wait_for_function(f"() => document.querySelector('.prose').innerText.length > {length + 60}")
    now = await page.locator("#messages").evaluate("it => it.scrollTop")
    assert now <= seen  # the wheel may still have been turning
    await latest.click()
    await expect(latest).to_have_count(0)
    assert await to_end(page) < 80
    home.end_reply(address)


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
        for _ in range(3):
            await page.keyboard.press("Escape")  # there is nothing to do without a key
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
