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
from rich.console import Console

from chatserve.cli.screen import Screen, describe_turn
from chatserve.protocol.events import usage_object
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

    def __init__(self, server, *arguments, term="dumb"):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "chatserve", *arguments, f"--url={server.url}"]
        environment = server_environment() | {"TERM": term, "COLUMNS": "100"}
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

    def start(*arguments, term="dumb"):
        opened.append(Terminal(live_server, *arguments, term=term))
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
    assert len(re.findall(r"\d+ of \d+ input tokens cached(?: from device)? · first token \d+ ms", first.stderr)) == 2
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


def test_fork_and_regenerate(live_server):
    """A reply made again stands in its own branch; a fork begins with as many turns as wanted and goes its own way."""
    lines = "My cat is called Mimbo.\n/regenerate\nWhat is my cat called?\n/fork 1\nWhat is my cat called?\n/fork 9\n"
    done = run(live_server, "chat", text=lines)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert "Mimbo" in done.stdout.splitlines()[3]
    assert "There are 2" in done.stderr
    fork_id = re.search(r"--session (\w+)", done.stderr)[1]
    fork = live_server.get(f"/v1/sessions/{fork_id}").json()
    assert [message["role"] for message in fork["messages"]] == ["user", "assistant"] * 2
    first_id = re.search(r"New session (\w+)", done.stderr)[1]
    first = live_server.get(f"/v1/sessions/{first_id}").json()
    assert [message["role"] for message in first["messages"]] == ["user", "assistant", "assistant", "user", "assistant"]
    assert first["messages"][1]["parent_id"] == first["messages"][2]["parent_id"]
    assert first["messages"][3]["parent_id"] == first["messages"][2]["id"]


def test_nothing_to_regenerate_or_fork(live_server):
    """In an empty session both say so, and the conversation goes on."""
    done = run(live_server, "chat", text="/regenerate\n/fork\n")
    assert done.returncode == 0
    assert "nothing to answer again" in done.stderr
    assert "There are 0" in done.stderr


def test_markdown_on_a_terminal(live_server, terminal):
    """On a terminal that can, a reply is shown as the Markdown it is, while it comes and in the history."""
    screen = terminal("chat", term="xterm-256color")
    screen.expect("you> ")
    screen.type("My cat is called Mimbo.\n")
    screen.expect("Mimbo(.|\n)*input tokens cached(.|\n)*you> ")
    screen.type("/fork\n")
    screen.expect("assistant> (.|\n)*Mimbo(.|\n)*you> ")
    screen.type("/quit\n")
    screen.expect("Go on later with")
    assert screen.process.wait(10) == 0


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ({"device": 0, "host": 0, "disk": 0}, "0 of 90 input tokens cached · "),
        ({"device": 40, "host": 0, "disk": 0}, "40 of 90 input tokens cached from device · "),
        ({"device": 30, "host": 0, "disk": 20}, "50 of 90 input tokens cached from device and disk · "),
    ],
)
def test_status_line_names_the_tiers(details, expected):
    """The line under a reply says how many tokens were found, and where."""
    cached = {name: count for name, count in details.items() if count}
    usage = usage_object(input_tokens=90, output_tokens=3, cached_tokens=cached)
    response = {"status": "completed", "usage": usage, "timings": {"ttft_ms": 5.0, "tokens_per_second": 100.0}}
    assert describe_turn(response, None).startswith(expected)


def test_screen_shows_markdown_without_what_moves_the_cursor(capsys):
    """Headings and lists are set as such; control characters are gone, and a link's target is in sight."""
    screen = Screen()
    screen._out = Console(force_terminal=True, width=60, color_system=None, legacy_windows=False)
    screen._shows_markdown = True
    screen.message("assistant", "# Head\n\n- one\x1b[2J\n- [here](https://example.org/x)")
    shown = capsys.readouterr().out
    assert "\x1b[2J" not in shown
    assert "#" not in shown
    assert "• one" in shown
    assert "https://example.org/x" in shown


def test_screen_shows_the_end_of_a_reply_that_is_taller(capsys):
    """While a long reply comes, its last lines are in sight; when it has ended, all of it was printed."""
    screen = Screen()
    screen._out = Console(force_terminal=True, width=40, height=6, color_system=None, legacy_windows=False)
    screen._shows_markdown = True
    for number in range(30):
        screen.reply_part(f"- line {number}\n")
    assert screen._live is not None
    screen._live.refresh()
    shown = capsys.readouterr().out
    assert "line 29" in shown
    screen.reply_end()
    whole = capsys.readouterr().out
    assert all(f"line {number}" in whole for number in range(30))


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
