"""Logging to stderr, for people or for machines, in every process. Records hold ids, counts and times; never prompts,
replies or keys.

What is bound with `bind` or `bound` stands in every line that follows from it, tasks begun meanwhile included.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["console", "json"]
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
NOISY_LOGGERS = ("uvicorn.error", "uvicorn.access", "websockets", "asyncio")
_bound_fields: ContextVar[Mapping[str, object] | None] = ContextVar("bound log fields", default=None)


def bind(**fields: object) -> None:
    """From now on this task's lines, and those of tasks that it begins, carry these fields."""
    _bound_fields.set({**(_bound_fields.get() or {}), **fields})


@contextmanager
def bound(**fields: object) -> Iterator[None]:
    """As `bind`, until the block ends; tasks begun in it keep them."""
    before = _bound_fields.get()
    bind(**fields)
    try:
        yield
    finally:
        _bound_fields.set(before)


class ConsoleFormatter(logging.Formatter):
    """Time, level, logger, message, then the record's own fields as `name=value`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 the name is logging's
        """The line without a traceback."""
        fields = "".join(f" {name}={_shown(value)}" for name, value in extra_fields(record).items())
        return super().formatMessage(record) + fields


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as an object: time, level, logger, message, its own fields, and a traceback if there is one."""
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **extra_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def extra_fields(record: logging.LogRecord) -> dict[str, object]:
    """What is bound where the record was made, and what the caller gave as `extra`."""
    given = {name: value for name, value in vars(record).items() if name not in _STANDARD_FIELDS}
    return {**(_bound_fields.get() or {}), **given}


def configure_logging(level: str, log_format: LogFormat) -> None:
    """Send everything to stderr; libraries speak from warnings on, and where `level` is debug from info on.

    Never below: what they say there has headers with keys and whole messages.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else ConsoleFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO if level == "debug" else logging.WARNING)


def _shown(value: object) -> str:
    """On one line, whatever a client chose as an id."""
    text = str(value)
    return text if text.isprintable() else ascii(text)
