"""What a log line looks like, for people and for machines."""

import json
import logging
import sys

import pytest

from chatserve.server.logs import ConsoleFormatter, JsonFormatter, configure_logging


def record(**fields):
    made = logging.makeLogRecord({"name": "chatserve.turn", "levelname": "INFO", "msg": "response %s", "args": ("ok",)})
    vars(made).update(fields)
    return made


def test_json_line():
    """One object a line: the message, its time, and the fields that were given with it."""
    line = JsonFormatter().format(record(created=0.5, cached_tokens=7, title="a\nb"))
    assert "\n" not in line
    assert json.loads(line) == {
        "ts": "1970-01-01T00:00:00.500+00:00",
        "level": "info",
        "logger": "chatserve.turn",
        "message": "response ok",
        "cached_tokens": 7,
        "title": "a\nb",
    }


def test_json_line_with_a_traceback():
    """An exception is a field of the line."""
    try:
        raise ValueError("what happened")
    except ValueError:
        line = JsonFormatter().format(record(exc_info=sys.exc_info()))
    assert "ValueError: what happened" in json.loads(line)["exception"]


def test_console_line():
    """The fields follow the message."""
    assert ConsoleFormatter().format(record(cached_tokens=7)).endswith("chatserve.turn: response ok cached_tokens=7")


@pytest.fixture
def root_logger():
    """The root logger, put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_libraries_speak_from_warnings_on(root_logger, capsys):
    """Our own lines come at the level asked for, those of libraries only when something is wrong."""
    configure_logging("info", "console")
    logging.getLogger("chatserve.x").info("ours")
    logging.getLogger("uvicorn.error").info("theirs")
    logging.getLogger("uvicorn.error").warning("their trouble")
    err = capsys.readouterr().err
    assert "ours" in err
    assert "their trouble" in err
    assert "theirs" not in err
