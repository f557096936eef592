"""What a server's log says of a turn, for machines: whose it was, from the front end and the engine alike."""

from __future__ import annotations

import json

from chatserve.client import ChatClient
from tests.e2e.talking import new_session, reply_to


async def test_every_line_is_json_and_a_turn_has_its_ids(start_server):
    """With --log-format json no line is anything else, the engine's included; a turn names all that it belongs to."""
    server = start_server("--log-format=json")
    async with ChatClient(server.url) as client:
        session_id = await new_session(client)
        reply = await reply_to(client, session_id, "Hello!")
    request_id = server.get("/healthz").headers["x-request-id"]
    assert server.stop() == 0
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert {"chatserve.engine.build", "chatserve.server.console"} <= {line["logger"] for line in lines}
    [turn] = [line for line in lines if line["message"] == "response completed"]
    assert turn["session_id"] == session_id
    assert turn["response_id"] == reply["id"]
    assert turn["connection_id"].startswith("conn_")
    assert turn["request_id"]
    assert request_id.startswith("req_")
