"""What is refused before a connection exists, and how hello can fail after."""

import asyncio
import json

import pytest
from websockets.exceptions import InvalidStatus

from chatserve.server.services import Timeouts
from tests.server.conftest import HELLO, Peer


async def refused(connecting):
    """The status and error code of a refused handshake."""
    with pytest.raises(InvalidStatus) as caught:
        await connecting
    response = caught.value.response
    return response.status_code, json.loads(response.body)["error"]["code"]


async def test_subprotocol_is_required(served):
    """Without a known subprotocol: 400 with the reason."""
    assert await refused(served.connect(subprotocol=None)) == (400, "bad_message")
    assert await refused(served.connect(subprotocol="chatserve.v2.msgpack")) == (400, "bad_message")


async def test_foreign_origin(served):
    """A page of another site gets 403."""
    assert await refused(served.connect(origin="http://evil.example")) == (403, "forbidden")


async def test_foreign_host(served):
    """On loopback a rebound host name gets 403, for WebSocket as for HTTP."""
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    handshake = {**upgrade, "Sec-WebSocket-Key": "c2l4dGVlbiBieXRlcyEhIQ==", "Host": "evil.example"}
    async with served.http() as http:
        answers = [await http.get("/v1/ws", headers=handshake), await http.get("/", headers={"Host": "evil.example"})]
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [(403, "forbidden")] * 2


async def test_too_many_connections_in_all(serve):
    """Past the total bound the handshake gets 429, also when the others never said hello."""
    served = await serve(max_connections=1)
    await served.connect()
    assert await refused(served.connect()) == (429, "rate_limited")


async def test_draining(served):
    """A server on its way out takes no new connection, and says so to those it has."""
    peer = await served.peer()
    served.services.hub.begin_drain(7.0)
    assert await refused(served.connect()) == (503, "server_draining")
    assert await peer.hear() == {
        "type": "goaway",
        "reason": "shutdown",
        "time_left_ms": 7000,
        "reconnect_after_ms": 1000,
    }


async def test_plain_request_to_the_websocket_address(served):
    """HTTP without an upgrade gets 426 and a word on what to do."""
    async with served.http() as http:
        response = await http.get("/v1/ws")
    assert response.status_code == 426
    assert response.headers["upgrade"] == "websocket"
    assert "chatserve.v1.msgpack" in response.json()["error"]["message"]


async def test_welcome(served):
    """Hello is answered by welcome with limits, model and heartbeat."""
    welcome = await Peer(await served.connect()).ask(**HELLO)
    assert welcome["type"] == "welcome"
    assert welcome["limits"] == {"max_message_bytes": 1 << 20, "max_sessions": 32, "max_connections": 64}
    assert welcome["models"] == [{"id": "fake-model", "max_context": 4096}]
    assert welcome["heartbeat_ms"] == 15_000


async def test_no_hello(serve):
    """Who says nothing is closed with 4408."""
    served = await serve(timeouts=Timeouts(hello_s=0.05))
    assert await Peer(await served.connect()).closed_with() == 4408


async def test_command_before_hello(served):
    """Who begins with something else gets the reason and 4400."""
    peer = Peer(await served.connect())
    answer = await peer.ask(type="session.create", id="c1", key="k1")
    assert (answer["id"], answer["error"]["code"]) == ("c1", "bad_message")
    assert await peer.closed_with() == 4400


async def test_second_hello(served):
    """Hello is said once; a second one is refused and changes nothing."""
    peer = await served.peer()
    assert (await peer.ask(**HELLO))["error"]["code"] == "invalid_value"
    assert (await peer.ask(type="ping", t=1.0))["type"] == "pong"


@pytest.mark.parametrize("token", [None, "wrong-key"])
async def test_unauthorized(serve, token):
    """No key or a wrong one: the error object, then 4401."""
    served = await serve(api_keys=("alice=alices-key",))
    peer = Peer(await served.connect())
    answer = await peer.ask(**HELLO, **({"token": token} if token else {}))
    assert answer["error"]["code"] == "unauthorized"
    assert await peer.closed_with() == 4401


async def test_key_in_header_or_hello(serve):
    """The key may come as a Bearer header or in hello; both open the same tenant."""
    served = await serve(api_keys=("alice=alices-key", "bob=bobs-key-2"))
    alice = Peer(await served.connect(additional_headers={"Authorization": "Bearer alices-key"}))
    assert (await alice.ask(**HELLO))["type"] == "welcome"
    session = (await alice.ask(type="session.create", id="c1", key="k1"))["session"]
    again = await served.peer(token="alices-key")
    assert (await again.ask(type="session.attach", id="c1", session_id=session["id"]))["type"] == "session.attached"
    bob = await served.peer(token="bobs-key-2")
    refusal = await bob.ask(type="session.attach", id="c1", session_id=session["id"])
    assert refusal["error"]["code"] == "session_not_found"


async def test_too_many_connections_of_a_key(serve):
    """Past the bound of a key the connection is welcomed with 4429; one that leaves makes room."""
    served = await serve(max_key_connections=1)
    first = await served.peer()
    second = Peer(await served.connect())
    assert (await second.ask(**HELLO))["error"]["code"] == "rate_limited"
    assert await second.closed_with() == 4429
    await first.socket.close()
    async with asyncio.timeout(5):
        while served.services.hub.num_connections:
            await asyncio.sleep(0.01)
    await served.peer()
