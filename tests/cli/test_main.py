"""The command line before any server: help, version, errors, and what is loaded for them."""

import subprocess
import sys

import pytest

from chatserve.cli import chat, config, healthcheck, main, serve, sessions
from chatserve.cli.text import one_line, printable
from chatserve.version import __version__
from tests.live import server_environment


def run(*arguments, **options):
    """`chatserve` in a process of its own."""
    command = [sys.executable, "-m", "chatserve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=server_environment(), **options)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "commands:"),
        (["serve", "--help"], "--kv-device-memory"),
        (["chat", "--help"], "/sessions"),
        (["sessions", "--help"], "list"),
        (["sessions", "list", "--help"], "--json"),
        (["sessions", "export", "--help"], "markdown"),
        (["healthcheck", "--help"], "--timeout"),
        (["config", "--help"], "config show"),
        (["--version"], f"chatserve {__version__}"),
    ],
)
def test_help(arguments, expected, capsys):
    """Every command explains itself."""
    with pytest.raises(SystemExit) as caught:
        main.main(arguments)
    assert caught.value.code == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["talk"],
        ["serve", "--prot=1"],
        ["serve", "--por=1"],
        ["sessions"],
        ["sessions", "export", "x", "--format=html"],
        ["chat", "--verbose"],
        ["config"],
        ["config", "set"],
        ["config", "show", "--prot=1"],
    ],
)
def test_bad_arguments(arguments, capsys):
    """What there is not is refused with status 2 and a usage line."""
    with pytest.raises(SystemExit) as caught:
        main.main(arguments)
    assert caught.value.code == 2
    assert "usage: chatserve" in capsys.readouterr().err


def test_bad_setting(capsys):
    """A bad setting ends with status 1 and a line that says what to do, before anything is loaded."""
    assert main.main(["serve", "--port=abc"]) == 1
    assert "port = 'abc'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["chat", "sessions list", "sessions export x", "healthcheck"])
def test_no_server(command, capsys):
    """Without a server, a line that names its address, and status 1."""
    assert main.main([*command.split(), "--url", "http://127.0.0.1:1"]) == 1
    assert "cannot connect to" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["chat", "sessions list", "healthcheck"])
def test_bad_url(command, capsys):
    """An address that is none is refused with an example."""
    assert main.main([*command.split(), "--url", "ftp://somewhere"]) == 1
    assert "http://HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize("module", [module.__name__ for module in (main, serve, chat, sessions, healthcheck, config)])
def test_commands_start_light(module):
    """Nothing that takes seconds to load is loaded for help, for chatting or for listing sessions."""
    heavy = ("torch", "transformers", "numpy", "redis", "starlette", "uvicorn")
    code = f"import sys, {module}; print(*(name for name in {heavy} if name in sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=server_environment(), check=True
    )
    assert loaded.stdout.split() == []


def test_printable():
    """Text of others cannot move the cursor, recolour the screen or ring the bell; its lines stay."""
    assert printable("a\x1b[31mred\x07\r\x9bK\nb\tc") == "a[31mredK\nb\tc"
    assert one_line("  a\n b\x1b  c ", 5) == "a b c"
    assert one_line("abcdef", 5) == "abcd…"
