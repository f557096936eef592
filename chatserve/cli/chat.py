"""`chatserve chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from chatserve.cli.connection_options import add_connection_options
from chatserve.cli.loop_thread import LoopThread
from chatserve.cli.reply import Reply
from chatserve.cli.screen import Screen, describe_turn
from chatserve.cli.sessions import session_lines
from chatserve.cli.text import one_line
from chatserve.client.chat import ChatClient
from chatserve.client.errors import ClientError, CommandFailedError
from chatserve.client.http import HttpApi
from chatserve.client.snapshot import branch, text_of

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 line editing for input(), where Python was built with it

LISTED_SESSIONS = 20
TITLE_CHARS = 48
HELP = """/new           start another session
/sessions      list sessions
/open NUMBER   go on with a session of the list, or with the one whose id is given
/regenerate    have the last message answered again, in another branch
/fork [TURNS]  go on in a new session that begins like this one, with all or the first TURNS of its turns
/quit          leave (so does Ctrl-D); the session stays
Ctrl-C         stop the reply that is being written"""


def main(arguments: Sequence[str]) -> int:
    """Talk until the end of input; returns the exit status: 1 if the last turn failed."""
    parsed = _parser().parse_args(arguments)
    try:
        client = ChatClient(parsed.url, token=parsed.api_key)
        api = HttpApi(parsed.url, token=parsed.api_key)
        with LoopThread() as loop:
            loop.call(client.connect())
            try:
                return Conversation(client, api, loop, Screen()).run(parsed.session)
            finally:
                loop.call(client.close())
    except (ClientError, TimeoutError, ValueError) as error:
        print(f"chatserve chat: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chatserve chat",
        description="Talk with a running server. Without a terminal, each line of standard input is a turn.",
        epilog=f"While chatting:\n{HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_connection_options(parser)
    parser.add_argument("--session", metavar="ID", help="session to go on with (default: a new one)")
    return parser


class Conversation:
    """The person's side of one session at a time."""

    def __init__(self, client: ChatClient, api: HttpApi, loop: LoopThread, screen: Screen) -> None:
        self._client = client
        self._api = api
        self._loop = loop
        self._screen = screen
        self._session_id = ""
        self._listed: list[str] = []
        self._failed = False
        self._untitled = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/new": lambda _: self._start(),
            "/sessions": lambda _: self._list(),
            "/open": self._open_listed,
            "/regenerate": lambda _: self._regenerate(),
            "/fork": self._fork,
            "/help": lambda _: self._screen.remark(HELP),
        }

    def run(self, session_id: str | None) -> int:
        """Open a session and carry out line after line; returns the exit status."""
        if session_id:
            self._open(session_id)
        else:
            self._start()
        for line in self._screen.lines():
            if line.strip() == "/quit":
                break
            self._carry_out(line)
        self._screen.remark(f"Go on later with: chatserve chat --session {self._session_id}")
        return int(self._failed)

    def _carry_out(self, line: str) -> None:
        if not line.strip():
            return
        name, _, argument = line.strip().partition(" ")
        action = self._commands.get(name)
        try:
            if action:
                action(argument.strip())
            elif name.startswith("/") and self._screen.interactive:
                self._screen.problem(f"There is no command {name}; /help lists them.")
            else:
                self._turn(line)
        except CommandFailedError as refusal:
            self._failed = True
            self._screen.problem(str(refusal))

    def _start(self) -> None:
        session = self._loop.call(self._client.create_session())
        self._follow(session["id"])
        self._untitled = True
        self._screen.remark(f"New session {session['id']}. /help lists commands.")

    def _open(self, session_id: str) -> None:
        attached = self._follow(session_id)
        for message in branch(attached["snapshot"]):
            self._screen.message(message["role"], text_of(message))
        self._screen.remark(f"Session {session_id}, {attached['snapshot'].get('title') or 'no title'}.")

    def _follow(self, session_id: str) -> dict[str, Any]:
        attached = self._loop.call(self._client.attach(session_id))
        if self._session_id and self._session_id != session_id:
            self._loop.call(self._client.detach(self._session_id))
        self._session_id = session_id
        self._untitled = False
        return attached

    def _list(self) -> None:
        sessions = self._api.list_sessions(limit=LISTED_SESSIONS)
        self._listed = [session["id"] for session in sessions]
        heading, *lines = session_lines(sessions)
        self._screen.note(f"    {heading}")
        for number, line in enumerate(lines, 1):
            self._screen.note(f"{number:>2}  {line}")

    def _open_listed(self, wanted: str) -> None:
        number = int(wanted) if wanted.isdecimal() else 0
        if 1 <= number <= len(self._listed):
            self._open(self._listed[number - 1])
        elif wanted and not number:
            self._open(wanted)
        else:
            self._screen.problem("Which one? /sessions lists them; then /open with a number of the list, or an id.")

    def _regenerate(self) -> None:
        path = branch(self._api.get_session(self._session_id))
        asked = [message["id"] for message in path if message["role"] == "user"]
        if asked:
            self._show(self._loop.call(self._client.respond(self._session_id, parent_id=asked[-1])))
        else:
            self._screen.problem("There is nothing to answer again yet.")

    def _fork(self, turns: str) -> None:
        path = branch(self._api.get_session(self._session_id))
        starts = [place for place, message in enumerate(path) if message["role"] == "user"]
        number = int(turns) if turns.isdecimal() else 0
        if (turns and not number) or number > len(starts) or not starts:
            self._screen.problem(f"Fork behind which turn? There are {len(starts)}; /fork alone takes all of them.")
            return
        end = starts[number] if 0 < number < len(starts) else len(path)
        fork = self._loop.call(self._client.fork_session(self._session_id, path[end - 1]["id"]))
        self._open(fork["id"])

    def _turn(self, text: str) -> None:
        accepted = self._loop.call(self._client.send(self._session_id, text))
        if self._untitled:
            self._loop.call(self._client.update_session(self._session_id, title=one_line(text, TITLE_CHARS)))
            self._untitled = False
        self._show(accepted)

    def _show(self, accepted: dict[str, Any]) -> None:
        """Show the reply that was accepted, as it comes, and what it cost."""
        reply = Reply(self._client, self._loop, self._screen, self._session_id, accepted["response_id"])
        response = reply.show()
        self._failed = response["status"] == "failed"
        if self._failed:
            self._screen.problem(f"The reply failed: {response['error']['message']}")
        models = self._client.welcome["models"]
        self._screen.remark(describe_turn(response, models[0].get("max_context") if models else None))
