"""Turns over HTTP on real sessions: waited for, streamed, repeated, cancelled, forked."""

import asyncio

import pytest

from tests.server.real import sse_events


async def test_turn_is_answered_when_it_is_done(real):
    """The answer carries the response as its terminal event does, and the session has both messages."""
    async with real() as server, server.http() as http:
        path = f"/v1/sessions/{(await http.post('/v1/sessions')).json()['id']}"
        answer = await http.post(f"{path}/responses", json={"input": "Hello"})
        body = answer.json()
        assert (answer.status_code, body["duplicate"]) == (200, False)
        assert (body["response"]["status"], body["response"]["text"]) == ("completed", "Well said.")
        assert body["response"]["usage"]["input_tokens"] > 0
        messages = (await http.get(path)).json()["messages"]
        assert [message["id"] for message in messages] == [body["message_id"], body["response"]["message_id"]]


@pytest.mark.parametrize("where", ["header", "body"])
async def test_same_key_gives_the_same_response(real, where):
    """A repeated key answers with the turn it made, running or long over; with another body it is a conflict."""
    async with real() as server, server.http() as http:
        path = f"/v1/sessions/{(await http.post('/v1/sessions')).json()['id']}/responses"
        keyed = (
            {"headers": {"Idempotency-Key": "once"}, "json": {"input": "Hello"}}
            if where == "header"
            else {"json": {"input": "Hello", "key": "once"}}
        )
        first, second = (await http.post(path, **keyed)).json(), (await http.post(path, **keyed)).json()
        assert second["duplicate"] is True
        assert second["response"] == first["response"]
        assert len(server.engine.requests) == 1
        other = await http.post(path, headers={"Idempotency-Key": "once"}, json={"input": "Bye"})
        assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")


async def test_stream_has_the_whole_turn(real):
    """With `stream` come all events of the turn, each with its place in the log, and the stream ends with it."""
    async with real() as server, server.http() as http:
        session = (await http.post("/v1/sessions")).json()
        turn = {"input": "Hello", "stream": True}
        async with http.stream("POST", f"/v1/sessions/{session['id']}/responses", json=turn) as response:
            events = [event async for event in sse_events(response)]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert [event.name for event in events[:2]] == ["message.created", "response.created"]
    assert events[-1].name == "response.completed"
    assert "".join(e.data["delta"] for e in events if e.name.endswith("delta")) == events[-1].data["response"]["text"]
    assert [event.id for event in events] == [f"{session['epoch']}:{event.data['seq']}" for event in events]


async def test_stream_of_a_turn_that_is_over(real):
    """A repeated key streams the end alone where the turn ended before."""
    async with real() as server, server.http(headers={"Idempotency-Key": "k"}) as http:
        path = f"/v1/sessions/{(await http.post('/v1/sessions')).json()['id']}/responses"
        whole = (await http.post(path, json={"input": "Hello"})).json()
        async with http.stream("POST", path, json={"input": "Hello", "stream": True}) as response:
            events = [event async for event in sse_events(response)]
    assert [event.name for event in events] == ["response.completed"]
    assert events[0].data["response"] == whole["response"]


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_does_not_cancel(real, stream):
    """Who goes away leaves the turn running, and gets its end by sending it again."""
    async with real(gated=True) as server, server.http() as http:
        path = f"/v1/sessions/{(await http.post('/v1/sessions')).json()['id']}"
        turn = {"input": "Hello", "key": "once"}
        asking = asyncio.create_task(http.post(f"{path}/responses", json={**turn, "stream": stream}))
        async with asyncio.timeout(5):
            while not server.engine.requests:
                await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        server.engine.allow(100)
        again = (await http.post(f"{path}/responses", json=turn)).json()
        assert (again["duplicate"], again["response"]["status"]) == (True, "completed")
        assert again["response"]["text"] == "Well said."


async def test_cancel(real):
    """A running response is cancelled once; a repeat says so; one that there is not is not found."""
    async with real(gated=True) as server, server.http() as http:
        path = f"/v1/sessions/{(await http.post('/v1/sessions')).json()['id']}/responses"
        async with http.stream("POST", path, json={"input": "Hello", "stream": True}) as response:
            events = sse_events(response)
            while (event := await anext(events)).name != "response.created":
                pass
            response_id = event.data["response"]["id"]
            cancelled = await http.post(f"{path}/{response_id}/cancel")
            assert cancelled.json() == {"response_id": response_id, "status": "cancelling"}
            assert [event.name async for event in events][-1] == "response.cancelled"
        assert (await http.post(f"{path}/{response_id}/cancel")).json()["status"] == "cancelled"
        unknown = await http.post(f"{path}/resp_none/cancel")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "response_not_found")


async def test_fork(real):
    """A fork has the messages up to the one named, under its own ids, and is made once a key."""
    async with real() as server, server.http() as http:
        path = f"/v1/sessions/{(await http.post('/v1/sessions', json={'title': 'One'})).json()['id']}"
        turn = (await http.post(f"{path}/responses", json={"input": "Hello"})).json()
        wanted = {"at_message_id": turn["response"]["message_id"], "key": "f"}
        made, again = await http.post(f"{path}/fork", json=wanted), await http.post(f"{path}/fork", json=wanted)
        assert (made.status_code, again.status_code) == (201, 200)
        assert made.json()["id"] == again.json()["id"]
        fork = (await http.get(f"/v1/sessions/{made.json()['id']}")).json()
        assert (fork["title"], [message["role"] for message in fork["messages"]]) == ("One", ["user", "assistant"])
        missing = await http.post(f"{path}/fork", json={"at_message_id": "msg_none"})
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "message_not_found")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"input": ""}, "invalid_value"),
        ({"input": "x", "stream": "yes"}, "invalid_value"),
        ({"input": "x", "inptu": "y"}, "invalid_value"),
        ({"input": "x", "temperature": 3.0}, "invalid_value"),
        ({}, "missing_field"),
    ],
)
async def test_bad_turns(real, body, code):
    """What cannot be a turn is refused with 400 and nothing is stored."""
    async with real() as server, server.http() as http:
        path = f"/v1/sessions/{(await http.post('/v1/sessions')).json()['id']}"
        answer = await http.post(f"{path}/responses", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
        assert (await http.get(path)).json()["messages"] == []


async def test_session_is_busy(real):
    """A second turn at a time is a conflict, told with 409."""
    async with real(gated=True) as server, server.http() as http:
        path = f"/v1/sessions/{(await http.post('/v1/sessions')).json()['id']}/responses"
        async with http.stream("POST", path, json={"input": "Hello", "stream": True}):
            second = await http.post(path, json={"input": "Hello"})
            assert (second.status_code, second.json()["error"]["code"]) == (409, "response_in_progress")
        server.engine.allow(100)


async def test_the_server_ends_while_somebody_waits(real):
    """Who waits for a turn that is left to the next server is told so, and what to do."""
    async with real(gated=True) as server, server.http() as http:
        path = f"/v1/sessions/{(await http.post('/v1/sessions')).json()['id']}/responses"
        asked = asyncio.create_task(http.post(path, json={"input": "Hello", "key": "once"}))
        async with asyncio.timeout(5):
            while not server.services.hub.num_connections:
                await asyncio.sleep(0.01)
        server.services.hub.begin_drain(0.0)
        await server.services.hub.close_all(1012, "bye", 1.0)
        answer = await asked
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_draining")
        assert answer.headers["retry-after"] == "1"
        server.engine.allow(100)
