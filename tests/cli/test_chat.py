"""`chatserve chat` and `chatserve sessions` as processes against a real server."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import httpx
import pytest

from tests.live import server_environment


def run(server, *arguments, text=""):
    """A command against the server, with its input from a pipe."""
    return subprocess.run(
        [sys.executable, "-m", "chatserve", *arguments, f"--url={server.url}"],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        env=server_environment(),
    )


def new_session(server, **fields):
    return httpx.post(f"{server.url}/v1/sessions", json=fields, trust_env=False).json()["id"]


class Terminal:
    """A command on a terminal."""

    def __init__(self, server, *arguments):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "chatserve", *arguments, f"--url={server.url}"]
        environment = server_environment() | {"TERM": "dumb"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.shown = ""

    def expect(self, pattern, timeout_s=60.0):
        """Read until the pattern appears behind what was expected before."""
        deadline_s = time.monotonic() + timeout_s
        while not (match := re.search(pattern, self.shown)):
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"{pattern!r} did not appear in {self.shown!r}"
            if select.select([self.master], [], [], left_s)[0]:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
        self.shown = self.shown[match.end() :]

    def type(self, text):
        os.write(self.master, text.encode())

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(live_server):
    """Starts commands on terminals of their own."""
    opened = []

    def start(*arguments):
        opened.append(Terminal(live_server, *arguments))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_piped_conversation(live_server):
    """Each line is a turn; replies go to stdout, everything else to stderr; the session can be gone on with."""
    first = run(live_server, "chat", text="My cat is called Mimbo.\n\nWhat is my cat called?\n")
    assert first.returncode == 0, first.stderr
    assert len(first.stdout.splitlines()) == 2
    assert "Mimbo" in first.stdout.splitlines()[1]
    assert len(re.findall(r"\d+ of \d+ input tokens cached · first token \d+ ms", first.stderr)) == 2
    session_id = re.search(r"--session (\w+)", first.stderr)[1]
    second = run(live_server, "chat", f"--session={session_id}", text="What is my cat called?\n")
    assert "Mimbo" in second.stdout
    assert "you> My cat is called Mimbo." in second.stderr
    shown = run(live_server, "sessions", "show", session_id).stdout
    assert shown.count("[user]") == 3
    assert "My cat is called Mimbo." in run(live_server, "sessions", "list").stdout
    assert run(live_server, "sessions", "delete", session_id).stdout == f"deleted {session_id}\n"
    assert session_id not in run(live_server, "sessions", "list", "--json").stdout


@pytest.mark.parametrize("arguments", [["chat", "--session=sess_none"], ["sessions", "show", "sess_none"]])
def test_unknown_session(live_server, arguments):
    """A session that there is not is named, with status 1."""
    done = run(live_server, *arguments)
    assert done.returncode == 1
    assert "sess_none" in done.stderr
    assert "Traceback" not in done.stderr


def test_failed_turn_is_the_exit_status(live_server):
    """A pipe whose last turn was refused ends with status 1 and the reason."""
    done = run(live_server, "chat", text="word " * 5000 + "\n")
    assert done.returncode == 1
    assert "context_length_exceeded" in done.stderr


def test_terminal(live_server, terminal):
    """On a terminal: a prompt, the reply with its cost, the list of sessions, another session, the way out."""
    screen = terminal("chat")
    screen.expect("New session (sess_)")
    screen.expect("you> ")
    screen.type("My cat is called Mimbo.\n")
    screen.expect("Mimbo(.|\n)*input tokens cached(.|\n)*tokens left(.|\n)*you> ")
    screen.type("/sessions\n")
    screen.expect(r" 1  sess_\w{26} .*My cat is called Mimbo\.(.|\n)*you> ")
    screen.type("/new\n")
    screen.expect("New session(.|\n)*you> ")
    screen.type("/open 1\n")
    screen.expect("you> My cat is called Mimbo.(.|\n)*assistant> (.|\n)*you> ")
    screen.type("/nonsense\n")
    screen.expect("no command /nonsense(.|\n)*you> ")
    screen.type("/quit\n")
    screen.expect("Go on later with")
    assert screen.process.wait(10) == 0


def test_interrupt_stops_the_reply(live_server, terminal):
    """Ctrl-C while a reply is written stops it and keeps what it said; the conversation goes on."""
    session_id = new_session(live_server, params={"ignore_eos": True, "max_output_tokens": 3500})
    screen = terminal("chat", f"--session={session_id}")
    screen.expect("you> ")
    screen.type("Hello!\n")
    screen.expect("Hello[^!]")
    time.sleep(0.3)
    screen.process.send_signal(signal.SIGINT)
    screen.expect("stopped · ")
    screen.expect("you> ")
    time.sleep(1)  # a signal between the prompt and the read behind it would be noticed at the next key only
    screen.process.send_signal(signal.SIGINT)
    screen.expect("Ctrl-D or /quit leaves(.|\n)*you> ")
    screen.type("\x04")
    assert screen.process.wait(10) == 0
    messages = live_server.get(f"/v1/sessions/{session_id}").json()["messages"]
    assert [message["state"] for message in messages] == ["complete", "cancelled"]
    assert messages[1]["content"][0]["text"]
