"""What a log line looks like, for people and for machines."""

import asyncio
import json
import logging
import sys

import pytest

from chatserve.logs import ConsoleFormatter, JsonFormatter, bind, bound, configure_logging


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


def test_lines_carry_what_is_bound():
    """In a block, and in tasks begun in it however long they live; what the caller gives comes before it."""

    async def fields_later(begun, ended):
        begun.set()
        await ended.wait()
        return JsonFormatter().format(record(session_id="given"))

    async def run():
        begun, ended = asyncio.Event(), asyncio.Event()
        with bound(connection_id="conn_1", session_id="bound"):
            bind(request_id="req_1")
            task = asyncio.create_task(fields_later(begun, ended))
            await begun.wait()
        ended.set()
        return json.loads(await task), json.loads(JsonFormatter().format(record()))

    inside, outside = asyncio.run(run())
    assert (inside["connection_id"], inside["request_id"], inside["session_id"]) == ("conn_1", "req_1", "given")
    assert not outside.keys() & {"connection_id", "request_id", "session_id"}


def test_an_id_cannot_begin_a_line():
    """Ids are a client's to choose: one with a line break stays in its line."""
    with bound(request_id="x\n12:00:00 ERROR forged"):
        line = ConsoleFormatter().format(record())
    assert "\n" not in line
