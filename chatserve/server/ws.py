"""`GET /v1/ws`: the handshake. Everything that can be refused with an HTTP status is refused here."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.websockets import WebSocket

from chatserve.errors import BadRequest, ServiceError
from chatserve.protocol.codec import Encoding
from chatserve.server.access import bearer_key
from chatserve.server.connection import Connection
from chatserve.server.replies import error_response
from chatserve.server.services import Services

SUBPROTOCOLS: dict[str, Encoding] = {"chatserve.v1.msgpack": "msgpack", "chatserve.v1.json": "json"}
_EXPECTED = f"offer the subprotocol {' or '.join(SUBPROTOCOLS)}"


async def websocket_endpoint(socket: WebSocket) -> None:
    """Refuse the handshake with a status and the error object, or serve the connection until it ends."""
    services: Services = socket.app.state.services
    try:
        services.hub.check_room()
        subprotocol = _chosen_subprotocol(socket.scope["subprotocols"])
    except ServiceError as refusal:
        await socket.send_denial_response(error_response(refusal))
        return
    await socket.accept(subprotocol)
    connection = Connection(
        socket,
        services,
        encoding=SUBPROTOCOLS[subprotocol],
        bearer=bearer_key(socket.headers.get("authorization")),
        send_all=socket.state.send_all,
        drop=socket.state.drop,
    )
    await connection.run()


async def plain_request(request: Request) -> Response:
    """Someone asked for the WebSocket address without an upgrade."""
    response = error_response(BadRequest(f"this address speaks WebSocket only; {_EXPECTED}", code="bad_message"))
    response.status_code = 426
    response.headers["Upgrade"] = "websocket"
    return response


def _chosen_subprotocol(offered: list[str]) -> str:
    for name in offered:  # in the client's order of preference
        if name in SUBPROTOCOLS:
            return name
    raise BadRequest(f"no known subprotocol among {offered}; {_EXPECTED}", code="bad_message")
