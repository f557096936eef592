"""Why a WebSocket connection ends: the close codes of protocol `chatserve.v1` and the exception that carries one."""

from __future__ import annotations

from enum import IntEnum

MAX_REASON_BYTES = 123  # a control frame holds no more
CLOSED_ABNORMALLY = 1006  # never on the wire: the connection was lost


class CloseCode(IntEnum):
    """The codes this server closes with. Clients come back after some of them, see `protocol.md`."""

    INTERNAL_ERROR = 1011
    RESTART = 1012
    TRY_AGAIN_LATER = 1013
    BAD_MESSAGE = 4400
    UNAUTHORIZED = 4401
    HELLO_TIMEOUT = 4408
    TOO_MANY_CONNECTIONS = 4429


class ClosingError(Exception):
    """This connection has to end, with a code and a reason for the peer."""

    def __init__(self, code: CloseCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")

    def __str__(self) -> str:
        return f"{self.code.value} {self.reason}"


class PeerGoneError(Exception):
    """The peer closed the connection, with this code, or its network went away."""

    def __init__(self, code: int = CLOSED_ABNORMALLY) -> None:
        super().__init__(code)
        self.code = code
