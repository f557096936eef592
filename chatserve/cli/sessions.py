"""`chatserve sessions list|show|export|import|delete`: the sessions of a running server, over HTTP."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chatserve.cli.connection_options import add_connection_options
from chatserve.cli.text import local_time, one_line, printable
from chatserve.client.errors import ClientError
from chatserve.client.http import HttpApi
from chatserve.client.snapshot import branch, text_of

TITLE_CHARS = 60


def main(arguments: Sequence[str]) -> int:
    """Run one of the subcommands; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    action: Callable[[HttpApi, argparse.Namespace], None] = parsed.action
    try:
        action(HttpApi(parsed.url, token=parsed.api_key), parsed)
    except (ClientError, ValueError, OSError) as error:
        print(f"chatserve sessions: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chatserve sessions", description="The sessions of a running server.")
    actions = parser.add_subparsers(required=True, metavar="list | show | export | import | delete")
    listing = actions.add_parser("list", help="list sessions, newest first")
    listing.add_argument("--limit", type=int, default=50, help="how many at most, up to 200 (default: 50)")
    listing.add_argument("--search", metavar="WORDS", default="", help="only those with all of these words in them")
    listing.set_defaults(action=_list)
    showing = actions.add_parser("show", help="print a session's messages")
    showing.set_defaults(action=_show)
    deleting = actions.add_parser("delete", help="delete sessions for good")
    deleting.set_defaults(action=_delete)
    _add_files(actions)
    showing.add_argument("session_id")
    deleting.add_argument("session_ids", nargs="+", metavar="session_id")
    for action in (listing, showing, deleting):
        add_connection_options(action)
    for action in (listing, showing):
        action.add_argument("--json", action="store_true", help="print what the server sent")
    return parser


def _add_files(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`export` and `import`."""
    exporting = actions.add_parser("export", help="write a session to a file")
    exporting.set_defaults(action=_export)
    exporting.add_argument("session_id")
    exporting.add_argument(
        "--format", choices=("json", "markdown"), default="json", help="json can be imported; markdown is for reading"
    )
    exporting.add_argument("--output", metavar="FILE", type=Path, help="file to write, instead of standard output")
    importing = actions.add_parser("import", help="make sessions from exported files")
    importing.set_defaults(action=_import)
    importing.add_argument("files", nargs="+", metavar="FILE", help="a file that export wrote as json; - is stdin")
    for action in (exporting, importing):
        add_connection_options(action)


def _export(api: HttpApi, parsed: argparse.Namespace) -> None:
    content = api.export_session(parsed.session_id, parsed.format)
    if parsed.output is not None:
        parsed.output.write_bytes(content)
        return
    # A terminal is not sent what a message may hold to control it; a file gets every byte.
    if sys.stdout.isatty():
        content = printable(content.decode()).encode()
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


def _import(api: HttpApi, parsed: argparse.Namespace) -> None:
    for name in parsed.files:
        document = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        print(f"imported {name} as {api.import_session(document)['id']}")


def _list(api: HttpApi, parsed: argparse.Namespace) -> None:
    sessions = api.list_sessions(limit=parsed.limit, search=parsed.search)
    if parsed.json:
        print(json.dumps(sessions, indent=2))
        return
    for line in session_lines(sessions):
        print(line)


def session_lines(sessions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sessions, a line each under a heading; the title stands last, so that nothing has to be cut for it."""
    if not sessions:
        return ["There are no sessions."]
    lines = [f"{'Session':<32}{'Last change':<18}{'Messages':>8}  Title"]
    for session in sessions:
        title = one_line(session["title"], TITLE_CHARS) or "(no title)"
        changed = local_time(session["updated_at"])
        lines.append(f"{session['id']:<32}{changed:<18}{session['num_messages']:>8}  {title}")
    return lines


def _show(api: HttpApi, parsed: argparse.Namespace) -> None:
    session = api.get_session(parsed.session_id)
    if parsed.json:
        print(json.dumps(session, indent=2))
        return
    for message in branch(session):
        print(f"[{message['role']}] {printable(text_of(message))}\n")


def _delete(api: HttpApi, parsed: argparse.Namespace) -> None:
    for session_id in parsed.session_ids:
        api.delete_session(session_id)
        print(f"deleted {session_id}")
