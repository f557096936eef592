"""uvicorn's WebSocket transport with what ASGI has no word for: giving up on a peer that does not read.

An ASGI `websocket.close` waits behind a full write buffer, so a stalled peer would hold its connection for ever.
"""

from __future__ import annotations

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState

DROP_GRACE_S = 1.0


class Transport(WebSocketsSansIOProtocol):
    """Adds `drop(code, reason)` to the connection's ASGI state."""

    async def run_asgi(self) -> None:
        """Run the application with `drop` in its scope."""
        self.scope["state"]["drop"] = self.drop
        await super().run_asgi()

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
