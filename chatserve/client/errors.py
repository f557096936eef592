"""What can go wrong on the client's side: the server refused something, or there is no server to talk with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ClientError(Exception):
    """Base of what this package raises."""


class CommandFailedError(ClientError):
    """The server refused a command; `error` is its error object.

    `was_repeated`: the command had gone out before, over a connection that was lost, and may have been carried out.
    """

    def __init__(self, error: Mapping[str, Any], *, was_repeated: bool = False) -> None:
        super().__init__(error.get("message", "the server gave no reason"))
        self.error = dict(error)
        self.was_repeated = was_repeated

    @property
    def code(self) -> str:
        """The protocol's code, such as `session_not_found`."""
        return str(self.error.get("code", "internal_error"))

    def __str__(self) -> str:
        return f"{self.code}: {super().__str__()}"


class ConnectionEndedError(ClientError):
    """There is no connection and coming back would not help; `code` is the close code or HTTP status, 0 for neither."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
