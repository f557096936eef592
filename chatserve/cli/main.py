"""The command `chatserve`: finds the subcommand and hands the rest of the command line to its module."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from chatserve.errors import StartupError
from chatserve.version import __version__

# By name, so that a command loads only what it needs: `chat` starts without the server's parts, `--help` without any.
COMMANDS = {
    "serve": ("chatserve.cli.serve", "serve a model to browsers and programs"),
    "chat": ("chatserve.cli.chat", "talk with a running server in this terminal"),
    "sessions": ("chatserve.cli.sessions", "list, show, export, import or delete the sessions of a running server"),
    "cache": ("chatserve.cli.cache", "measure, verify or compact a page cache on disk that no server has open"),
    "healthcheck": ("chatserve.cli.healthcheck", "say whether a server is ready, as its exit status"),
    "config": ("chatserve.cli.config", "show the settings that a server would have, and where they came from"),
    "doctor": ("chatserve.cli.doctor", "say what this machine has, and test whether a server would work on it"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `chatserve` with the given arguments, the process's own by default; returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parsed = _parser().parse_args(given[:1])
    try:
        status: int = import_module(COMMANDS[parsed.command][0]).main(given[1:])
    except StartupError as error:
        print(f"chatserve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="chatserve",
        usage="chatserve [--help] [--version] COMMAND ...",
        description="A chat session server whose turns cost their new tokens only.",
        epilog=f"commands:\n{listing}\n\n`chatserve COMMAND --help` explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"chatserve {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser
