"""uvicorn's WebSocket transport with what ASGI has no word for: many messages at once, giving up on a silent peer.

A system call and the layers of an application for each message would be most of what a small one costs. An ASGI
`websocket.close` waits behind a full write buffer, so a stalled peer would hold its connection for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState

DROP_GRACE_S = 1.0


class Transport(WebSocketsSansIOProtocol):
    """Adds `send_all(messages)` and `drop(code, reason)` to the connection's ASGI state."""

    async def run_asgi(self) -> None:
        """Run the application with both in its scope."""
        self.scope["state"] |= {"send_all": self.send_all, "drop": self.drop}
        await super().run_asgi()

    async def send_all(self, messages: Sequence[bytes | str]) -> None:
        """Send messages of an open connection in one write, once the peer has taken enough of what was sent before.

        Raises ClientDisconnected where it has gone.
        """
        await self.writable.wait()
        if self.disconnected or self.close_sent:
            raise ClientDisconnected
        try:
            for message in messages:
                if isinstance(message, str):
                    self.conn.send_text(message.encode())
                else:
                    self.conn.send_binary(message)
        except InvalidState:
            raise ClientDisconnected from None
        self.transport.write(b"".join(self.conn.data_to_send()))

    def drop(self, code: int, reason: str) -> None:
        """Queue a close frame behind whatever is unsent, and cut the connection soon whether or not it went out."""
        if not self.close_sent and not self.transport.is_closing():
            try:
                self.conn.send_close(code, reason)
            except InvalidState:
                pass  # the peer closed first
            else:
                self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
        self.loop.call_later(DROP_GRACE_S, self.transport.abort)
