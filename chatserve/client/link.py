"""One WebSocket to the server, from the handshake to the welcome: what `ChatClient` replaces when it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.typing import Subprotocol

from chatserve.client.errors import ConnectionEndedError
from chatserve.protocol.codec import Encoding, encode, from_wire
from chatserve.version import __version__

CLOSE_TIMEOUT_S = 1.0
MAX_MESSAGE_BYTES = 64 << 20  # a snapshot holds a whole session
FINAL_CLOSE_CODES = frozenset({1000, 1007, 1009, 4400, 4401, 4403, 4409})
FINAL_STATUSES = frozenset({400, 401, 403, 404, 426})


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a client waits, in seconds.

    After `quiet_s` without a word, `reply_quiet_s` while a reply or an answer is due, the server is asked whether it is
    there; without any answer for `pong_s` the connection counts as lost. Pauses before coming back are drawn between 0
    and `first_backoff_s`, which doubles up to `max_backoff_s`.
    """

    open_s: float = 10.0
    quiet_s: float = 15.0
    reply_quiet_s: float = 2.0
    pong_s: float = 3.0
    first_backoff_s: float = 0.25
    max_backoff_s: float = 10.0


class LinkLostError(Exception):
    """The connection is gone, or could not be made; trying again may help."""


class Link:
    """A welcomed connection. `send` and `receive` raise LinkLostError, or ConnectionEndedError where it is final."""

    def __init__(self, socket: ClientConnection, encoding: Encoding, patience: Patience) -> None:
        self._socket = socket
        self._encoding: Encoding = encoding
        self._patience = patience
        self.welcome: dict[str, Any] = {}

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        encoding: Encoding,
        token: str | None,
        resume: Sequence[Mapping[str, Any]],
        patience: Patience,
    ) -> Link:
        """Connect to a WebSocket base URL, say hello and wait for the welcome."""
        try:
            async with asyncio.timeout(patience.open_s):
                link = cls(await _connect(url, encoding, token), encoding, patience)
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

    async def receive(self, *, is_due: bool) -> dict[str, Any]:
        """The next event; where none comes, the server is asked whether it is there. `is_due`: one should come soon."""
        try:
            while True:
                event = await self._receive_within(self._patience.reply_quiet_s if is_due else self._patience.quiet_s)
                if event is None:
                    event = await self._confirm()
                if event is not None:
                    return event
        except ConnectionClosed as error:
            raise _from_close(error) from None

    async def close(self) -> None:
        """Say goodbye; a server that does not answer is not waited for long."""
        await self._socket.close()

    async def _receive_within(self, timeout_s: float) -> dict[str, Any] | None:
        try:
            async with asyncio.timeout(timeout_s):
                data = await self._socket.recv()
        except TimeoutError:
            return None
        event: dict[str, Any] = json.loads(data) if isinstance(data, str) else from_wire(data)
        return event

    async def _confirm(self) -> dict[str, Any] | None:
        """Ask the server whether it is there; gives an event if one comes meanwhile. Raises LinkLostError."""
        pong = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience.pong_s):
                pong = asyncio.ensure_future(await self._socket.ping())
        event = await self._receive_within(self._patience.pong_s)
        if event is None and (pong is None or not pong.done()):
            self._socket.transport.abort()
            raise LinkLostError(f"the server was silent for {self._patience.pong_s:g} s")
        return event

    async def _greet(self, resume: Sequence[Mapping[str, Any]]) -> None:
        try:
            await self.send(_hello(resume))
            while not self.welcome:
                event = await self.receive(is_due=False)  # perhaps an error: the close code after it says the rest
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
        open_timeout=None,
        ping_interval=None,
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
