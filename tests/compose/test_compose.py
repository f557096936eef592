"""`docker compose --profile cpu up chatserve-cpu redis` from a fresh clone; skipped where no engine runs.

    python -m pytest tests/compose

Builds images (minutes the first time) and removes its containers and volumes at the end, not the images.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import sync_playwright

from chatserve.client import ChatClient
from chatserve.protocol.events import TERMINAL_EVENTS
from tests.compose.project import SERVICE, ComposeProject, compose_command, fresh_clone
from tests.e2e.talking import new_session, reply_to
from tests.page.conftest import BROWSERS

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
LONG = "Count from 1 to 60."
NAME = "My name is Zorvin."


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeProject]:
    """The services, built and healthy; all tests share them and leave them running."""
    command = compose_command()
    if command is None:
        pytest.skip("no container engine with compose answers here")
    clone = tmp_path_factory.mktemp("clone")
    fresh_clone(clone)
    made = ComposeProject(command, clone)
    try:
        made.up("--build")
        yield made
    finally:
        made.run("down", "--volumes")


def test_page_and_completions_are_served(project):
    """The page with its script, and a completion, over HTTP."""
    page = httpx.get(project.url, trust_env=False)
    assert (page.status_code, "<script" in page.text) == (200, True)
    body = {"model": "bundled", "messages": [{"role": "user", "content": NAME}], "temperature": 0}
    answer = httpx.post(f"{project.url}/v1/chat/completions", json=body, trust_env=False, timeout=60)
    assert "Zorvin" in answer.json()["choices"][0]["message"]["content"]


def test_page_answers_in_a_browser(project):
    """A person opens the page and says a name; the answer repeats it and says what it cost, and nothing fails."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser on PATH: none of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"]).new_page()
        faults: list[str] = []
        page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
        page.goto(project.url)
        page.locator("textarea").first.fill(NAME)
        page.keyboard.press("Enter")
        page.get_by_role("log").get_by_text("Zorvin").nth(1).wait_for(timeout=10_000)
        page.get_by_role("log").get_by_text("to first token").wait_for(timeout=10_000)
    assert faults == []


async def test_chat_is_served(project):
    """A conversation over the WebSocket, whose second turn needs its first."""
    session_id = await tell_name(project)
    await check_remembers(project, session_id, "device")


def test_containers_are_confined(project):
    """No root, nothing writable but the volumes, no capability, and a port that only this machine reaches."""
    confinement = "{{.Config.User}} {{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}}"
    assert project.inspect(SERVICE, confinement) == "chatserve true [ALL]"
    assert project.inspect("redis", confinement) == "redis true [ALL]"
    assert project.inspect("redis", "{{.HostConfig.PortBindings}}") == "map[]"
    ports = "{{range .HostConfig.PortBindings}}{{range .}}{{.HostIp}};{{end}}{{end}}"
    assert project.inspect(SERVICE, ports) == "127.0.0.1;"


@pytest.mark.parametrize(("service", "source"), [(SERVICE, "disk"), ("redis", "device")])
async def test_sessions_survive_a_restart(project, service, source):
    """After `restart` a session is there and goes on from its history, which is read from disk where it has to be."""
    session_id = await tell_name(project)
    await asyncio.to_thread(project.run, "restart", service)
    await asyncio.to_thread(project.wait_healthy)
    await check_remembers(project, session_id, source)


async def test_down_and_up_keep_the_volumes(project):
    """`down` removes the containers, `up` makes new ones that find sessions and histories."""
    session_id = await tell_name(project)
    await asyncio.to_thread(project.run, "down")
    await asyncio.to_thread(project.up)
    await check_remembers(project, session_id, "disk")


async def test_killed_in_mid_answer(project):
    """SIGKILL of the container in mid-answer, then `up`: the same client sees the same answer to its end."""
    async with ChatClient(project.url) as client:
        reference = (await reply_to(client, await new_session(client), LONG))["text"]
        session_id = await new_session(client)
        container = project.container(SERVICE)
        await client.send(session_id, LONG, temperature=0)
        kinds, text = await watch_reply(client, lambda: restart_killed(project, container))
    assert "response.resumed" in kinds
    assert text == reference


async def tell_name(project: ComposeProject) -> str:
    """A new session that was told a name; returns its id."""
    async with ChatClient(project.url) as client:
        session_id = await new_session(client)
        await reply_to(client, session_id, NAME)
    return session_id


async def check_remembers(project: ComposeProject, session_id: str, source: str) -> None:
    """The session's next turn knows the name and finds its history in `source`."""
    async with ChatClient(project.url) as client:
        await client.attach(session_id)
        reply = await reply_to(client, session_id, "What is my name?")
    assert "Zorvin" in reply["text"]
    assert reply["usage"]["input_tokens_details"]["cached_tokens"] > 0
    assert reply["cache"]["restored_from"] == source


async def watch_reply(client: ChatClient, on_text) -> tuple[list[str], str]:
    """Follow a reply, calling `on_text` at its first text; returns the kinds of its events and the text."""
    kinds: list[str] = []
    disturbing = None
    async for event in client.events():
        kinds.append(event["type"])
        if event["type"] == "response.output_text.delta" and disturbing is None:
            disturbing = asyncio.create_task(asyncio.to_thread(on_text))
        if event["type"] in TERMINAL_EVENTS:
            break
    assert disturbing is not None, "the reply had no text"
    await disturbing
    return kinds, event["response"]["text"]


def restart_killed(project: ComposeProject, container: str) -> None:
    """Kill the server's container as a power cut would, and have compose start it again."""
    subprocess.run(["docker", "kill", container], check=True, capture_output=True, timeout=60)
    project.up()
