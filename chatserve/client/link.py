"""One WebSocket to the server, from the handshake to the welcome: what `ChatClient` replaces when it breaks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.typing import Subprotocol

from chatserve.client.errors import ConnectionEndedError
from chatserve.protocol.codec import Encoding, encode, from_wire
from chatserve.version import __version__

OPEN_TIMEOUT_S = 10.0
PING_INTERVAL_S = 15.0
PING_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 1.0
MAX_MESSAGE_BYTES = 64 << 20  # a snapshot holds a whole session
FINAL_CLOSE_CODES = frozenset({1000, 1007, 1009, 4400, 4401, 4403, 4409})
FINAL_STATUSES = frozenset({400, 401, 403, 404, 426})


class LinkLostError(Exception):
    """The connection is gone, or could not be made; trying again may help."""


class Link:
    """A welcomed connection. `send` and `receive` raise LinkLostError, or ConnectionEndedError where it is final."""

    def __init__(self, socket: ClientConnection, encoding: Encoding) -> None:
        self._socket = socket
        self._encoding: Encoding = encoding
        self.welcome: dict[str, Any] = {}

    @classmethod
    async def open(
        cls, url: str, *, encoding: Encoding, token: str | None, resume: Sequence[Mapping[str, Any]]
    ) -> Link:
        """Connect to a WebSocket base URL, say hello and wait for the welcome."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                link = cls(await _connect(url, encoding, token), encoding)
                await link._greet(resume)
        except InvalidStatus as error:
            raise _from_status(error) from None
        except (OSError, TimeoutError, InvalidHandshake) as error:
            raise LinkLostError(f"{url}: {str(error) or 'no answer'}") from None
        except InvalidURI as error:
            raise ConnectionEndedError(0, str(error)) from None
        return link

    async def send(self, command: Mapping[str, Any]) -> None:
        """Send one command."""
        try:
            await self._socket.send(encode(command, self._encoding))
        except ConnectionClosed as error:
            raise _from_close(error) from None

    async def receive(self) -> dict[str, Any]:
        """The next event."""
        try:
            data = await self._socket.recv()
        except ConnectionClosed as error:
            raise _from_close(error) from None
        event: dict[str, Any] = json.loads(data) if isinstance(data, str) else from_wire(data)
        return event

    async def close(self) -> None:
        """Say goodbye; a server that does not answer is not waited for long."""
        await self._socket.close()

    async def _greet(self, resume: Sequence[Mapping[str, Any]]) -> None:
        try:
            await self.send(_hello(resume))
            while not self.welcome:
                event = await self.receive()  # an error may come first: the close code after it says the rest
                self.welcome = event if event["type"] == "welcome" else {}
        except BaseException:  # a cancelled greeting must not leave its socket open either; raised again
            await self.close()
            raise


async def _connect(url: str, encoding: Encoding, token: str | None) -> ClientConnection:
    return await connect(
        f"{url}/v1/ws",
        subprotocols=[Subprotocol(f"chatserve.v1.{encoding}")],
        additional_headers={"Authorization": f"Bearer {token}"} if token else None,
        compression=None,
        open_timeout=OPEN_TIMEOUT_S,
        ping_interval=PING_INTERVAL_S,
        ping_timeout=PING_TIMEOUT_S,
        close_timeout=CLOSE_TIMEOUT_S,
        max_size=MAX_MESSAGE_BYTES,
    )


def _hello(resume: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    client = {"name": "chatserve-python", "version": __version__}
    return {"type": "hello", "client": client, "resume": list(resume)}


def _from_close(error: ConnectionClosed) -> LinkLostError | ConnectionEndedError:
    code, reason = (error.rcvd.code, error.rcvd.reason) if error.rcvd else (1006, "the connection was lost")
    if code in FINAL_CLOSE_CODES:
        return ConnectionEndedError(code, reason or f"the server closed the connection with code {code}")
    return LinkLostError(reason or f"closed with code {code}")


def _from_status(error: InvalidStatus) -> LinkLostError | ConnectionEndedError:
    status = error.response.status_code
    try:
        reason = json.loads(error.response.body or b"")["error"]["message"]
    except (ValueError, KeyError, TypeError):  # not from our server, or from one that is not ours
        reason = f"the server refused the connection with HTTP status {status}"
    return ConnectionEndedError(status, reason) if status in FINAL_STATUSES else LinkLostError(reason)
