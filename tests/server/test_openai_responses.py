"""`/v1/responses` over real sessions and an engine that says what the test wants, through a real server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from chatserve.errors import BadRequest, Unavailable
from chatserve.server.openai.response_body import read_response
from chatserve.server.openai.response_object import private_ids
from tests.server.real import ALICE, BOB, EOS, KEYS, TOKENIZER, sse_events
from tests.server.test_openai_chat import templated, until

PATH = "/v1/responses"
EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


async def ask(http: Any, text: Any = "Hello", *, key: str | None = None, **fields: Any) -> Any:
    headers = {"Idempotency-Key": key} if key else {}
    return await http.post(PATH, json={"input": text, "temperature": 0, **fields}, headers=headers)


async def events_of(http: Any, **fields: Any) -> list[dict[str, Any]]:
    async with http.stream("POST", PATH, json={"input": "Hello", "stream": True, **fields}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [event async for event in sse_events(response)]
    assert [event.name for event in events] == [event.data["type"] for event in events]
    return [event.data for event in events]


def said_by(role: str, text: str) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


async def test_whole(real):
    """The object says what was asked, what was said and what it cost; it is found again as it was, its input too."""
    asked = {"instructions": "Be kind.", "metadata": {"a": "b"}, "max_output_tokens": 50, "user": "me", "top_p": 0.5}
    async with real() as server, server.http() as http:
        body = (await ask(http, **asked)).json()
        again = (await http.get(f"{PATH}/{body['id']}")).json()
        items = (await http.get(f"{PATH}/{body['id']}/input_items")).json()
        session_id = private_ids(body["id"], "id")[0]
        session = (await http.get(f"/v1/sessions/{session_id}")).json()
        num_prompt = len(server.engine.requests[0].token_ids)
    assert (body["object"], body["status"], body["error"], body["incomplete_details"]) == (
        "response",
        "completed",
        None,
        None,
    )
    assert {name: body[name] for name in asked} == asked
    assert (body["store"], body["temperature"], body["previous_response_id"]) == (True, 0, None)
    part = {"type": "output_text", "text": "Well said.", "annotations": [], "logprobs": []}
    item = {"id": body["output"][0]["id"], "type": "message", "status": "completed", "role": "assistant"}
    assert body["output"] == [{**item, "content": [part]}]
    num_said = len(TOKENIZER.encode("Well said.")) + 1
    assert body["usage"] == {
        "input_tokens": num_prompt,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": num_said,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_prompt + num_said,
    }
    assert again == body
    assert [item["content"] for item in items["data"]] == [[{"type": "input_text", "text": "Hello"}]]
    assert (session["instructions"], len(session["messages"])) == ("Be kind.", 2)


async def test_stream(real):
    """The events have OpenAI's names and order, are numbered, and their texts agree with the object at the end."""
    async with real() as server, server.http() as http:
        events = await events_of(http)
        stored = (await http.get(f"{PATH}/{events[-1]['response']['id']}")).json()
    assert list(dict.fromkeys(event["type"] for event in events)) == EVENTS
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "".join(event.get("delta", "") for event in events) == "Well said."
    assert (events[-4]["text"], events[-3]["part"]["text"]) == ("Well said.", "Well said.")
    assert events[-2]["item"] == events[-1]["response"]["output"][0]
    assert events[-1]["response"] == stored
    assert (events[0]["response"]["status"], events[0]["response"]["output"]) == ("in_progress", [])
    assert {event["item_id"] for event in events if "item_id" in event} == {stored["output"][0]["id"]}


@pytest.mark.parametrize("stream", [False, True])
async def test_not_stored(real, stream):
    """Without `store` the same is told, and nothing is kept: no session, no response."""
    async with real() as server, server.http() as http:
        if stream:
            events = await events_of(http, store=False)
            assert list(dict.fromkeys(event["type"] for event in events)) == EVENTS
            assert [event["sequence_number"] for event in events] == list(range(len(events)))
            body = events[-1]["response"]
        else:
            body = (await ask(http, store=False)).json()
        assert (await http.get("/v1/sessions")).json()["data"] == []
        assert (await http.get(f"{PATH}/{body['id']}")).status_code == 404
    assert (body["status"], body["store"], body["output"][0]["content"][0]["text"]) == (
        "completed",
        False,
        "Well said.",
    )
    assert body["usage"]["input_tokens"] == len(templated(message("user", "Hello")))


async def test_next_turn_of_the_session(real):
    """`previous_response_id` goes on in its session, with that session's very ids and its history cached."""
    async with real() as server, server.http() as http:
        first = (await ask(http)).json()
        stored = [*next(iter(server.engine.held.values())), EOS]
        second = (await ask(http, "And now?", previous_response_id=first["id"])).json()
        sessions = (await http.get("/v1/sessions")).json()["data"]
        ids = list(server.engine.requests[1].token_ids)
        items = (await http.get(f"{PATH}/{second['id']}/input_items", params={"order": "asc"})).json()
    assert (len(sessions), second["previous_response_id"]) == (1, first["id"])
    assert ids[: len(stored)] == stored
    assert second["usage"]["input_tokens_details"]["cached_tokens"] == len(stored) - 1
    assert [item["content"][0]["text"] for item in items["data"]] == ["Hello", "Well said.", "And now?"]
    assert items["data"][1] == {**first["output"][0], "status": "completed"}


async def test_branch_behind_an_older_response(real):
    """Two responses behind the same one are two branches; neither sees the other."""
    async with real() as server, server.http() as http:
        first = (await ask(http)).json()
        for text in ("one", "two"):
            await ask(http, text, previous_response_id=first["id"])
        decoded = TOKENIZER.decode(server.engine.requests[2].token_ids)
    assert ("one" in decoded, "two" in decoded) == (False, True)


async def test_two_at_once_behind_the_same(real):
    """While one response runs in the session, another behind the same one begins in a session of its own."""
    async with real(gated=True) as server, server.http() as http:
        server.engine.allow(100)
        first = (await ask(http)).json()
        server.engine._allowed = asyncio.Semaphore(0)
        both = [asyncio.create_task(ask(http, text, previous_response_id=first["id"])) for text in ("one", "two")]
        await until(lambda: len(server.engine.requests) == 3)
        server.engine.allow(100)
        bodies = [(await task).json() for task in both]
        sessions = (await http.get("/v1/sessions")).json()["data"]
        first_ids, *later_ids = [list(request.token_ids) for request in server.engine.requests]
    assert [body["status"] for body in bodies] == ["completed"] * 2
    assert len({private_ids(body["id"], "id")[0] for body in bodies}) == len(sessions) == 2
    spoken = [*first_ids, *TOKENIZER.encode("Well said.", add_special_tokens=False), EOS]
    assert [ids[: len(spoken)] for ids in later_ids] == [spoken] * 2


@pytest.mark.parametrize("stored", [True, False])
async def test_instructions_are_each_responses_own(real, stored):
    """Instructions hold for their response only, what the input says as the system for all that follow."""
    async with real() as server, server.http() as http:
        opening = [message("developer", "Rhyme."), message("user", "Hello")]
        first = (await ask(http, opening, instructions="Be kind.")).json()
        await ask(http, "Go on", previous_response_id=first["id"], instructions="Be brief.", store=stored)
        await ask(http, "Go on", previous_response_id=first["id"], store=stored)
        prompts = [list(request.token_ids) for request in server.engine.requests]
    texts = ["Be kind.\n\nRhyme.", "Be brief.\n\nRhyme.", "Rhyme."]
    history = [message("user", "Hello"), message("assistant", "Well said."), message("user", "Go on")]
    expected = [templated(message("system", text), *history[: 1 if not i else 3]) for i, text in enumerate(texts)]
    assert [TOKENIZER.decode(ids) for ids in prompts] == [TOKENIZER.decode(ids) for ids in expected]


async def test_conversation_as_input(real):
    """Earlier messages in the input open the session; a response's own output goes back as it came."""
    async with real() as server, server.http() as http:
        output = (await ask(http)).json()["output"]
        body = (await ask(http, [said_by("user", "Hello"), *output, said_by("user", "Bye")])).json()
        ids = list(server.engine.requests[1].token_ids)
        session = (await http.get(f"/v1/sessions/{private_ids(body['id'], 'id')[0]}")).json()
    assert ids == templated(message("user", "Hello"), message("assistant", "Well said."), message("user", "Bye"))
    assert [m["role"] for m in session["messages"]] == ["user", "assistant", "user", "assistant"]


async def test_more_messages_behind_a_response(real):
    """Several new messages behind a response begin a session with a copy of what was said."""
    async with real() as server, server.http() as http:
        first = (await ask(http)).json()
        more = [message("user", "One"), message("assistant", "Two"), message("user", "Three")]
        body = (await ask(http, more, previous_response_id=first["id"])).json()
        ids = list(server.engine.requests[1].token_ids)
    assert body["status"] == "completed"
    before = [message("user", "Hello"), message("assistant", "Well said.")]
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(templated(*before, *more))


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_does_not_end_a_stored_response(real, stream):
    """A client that goes away leaves a stored response running; it is there when asked for."""
    async with real(gated=True) as server, server.http() as http:
        server.engine.allow(2)
        asking = asyncio.create_task(ask(http, stream=stream))
        await until(lambda: server.services.sessions.num_running)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        server.engine.allow(100)
        await until(lambda: not server.services.sessions.num_running)
        (session,) = (await http.get("/v1/sessions")).json()["data"]
        reply = (await http.get(f"/v1/sessions/{session['id']}")).json()["messages"][1]
    assert (reply["state"], reply["content"][0]["text"]) == ("complete", "Well said.")


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_ends_what_is_not_stored(real, stream):
    """A client that goes away cancels a response that nobody could ask for again."""
    async with real(gated=True) as server, server.http() as http:
        server.engine.allow(2)
        asking = asyncio.create_task(ask(http, stream=stream, store=False))
        await until(lambda: server.engine.held)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: not server.engine.held)


async def test_running_and_cancelled(real):
    """A running response shows what it has said; cancelled it keeps that, and cancelling again changes nothing."""
    async with real(gated=True) as server, server.http() as http:
        server.engine.allow(2)
        streaming = asyncio.create_task(events_of(http))
        await until(lambda: server.engine.requests and len(server.engine.held) and server.services.sessions.num_running)
        (session,) = (await http.get("/v1/sessions")).json()["data"]
        response_id = f"resp_{session['id'][5:]}{session['active_response_id'][5:]}"
        path = f"{PATH}/{response_id}"
        running = (await http.get(path)).json()
        early = await ask(http, "More", previous_response_id=response_id)
        cancelled = (await http.post(f"{path}/cancel")).json()
        events = await streaming
        again = (await http.post(f"{path}/cancel")).json()
    assert (running["status"], running["usage"]) == ("in_progress", None)
    assert (early.status_code, early.json()["error"]["code"]) == (409, "response_in_progress")
    assert (cancelled["status"], cancelled["output"][0]["status"]) == ("cancelled", "incomplete")
    assert again == cancelled == events[-1]["response"]
    assert events[-1]["type"] == "response.incomplete"


@pytest.mark.parametrize("store", [True, False])
async def test_incomplete(real, store):
    """A response that runs into its bound is incomplete and says why."""
    async with real() as server, server.http() as http:
        body = (await ask(http, max_output_tokens=2, store=store)).json()
        events = await events_of(http, max_output_tokens=2, store=store)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (body["output"][0]["status"], body["usage"]["output_tokens"]) == ("incomplete", 2)
    assert (events[-1]["type"], events[-1]["response"]["status"]) == ("response.incomplete", "incomplete")


@pytest.mark.parametrize("store", [True, False])
async def test_failed(real, store):
    """A response that fails in the stream ends with its object, which says why."""
    async with real(gated=True) as server, server.http() as http:
        server.engine.allow(2)
        streaming = asyncio.create_task(events_of(http, store=store))
        await until(lambda: server.engine.held and len(next(iter(server.engine.held.values()))) > 20)
        server.engine.failure = Unavailable("the engine stopped", code="server_interrupted")
        server.engine.allow()
        events = await streaming
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert (events[-1]["type"], events[-1]["response"]["status"]) == ("response.failed", "failed")
    assert events[-1]["response"]["error"] == {"code": "server_interrupted", "message": "the engine stopped"}


async def test_same_key(real):
    """An `Idempotency-Key` makes asking again harmless, whole or as a stream; with another body it is a conflict."""
    async with real() as server, server.http() as http:
        first = (await ask(http, key="once")).json()
        second = (await ask(http, key="once")).json()
        other = await ask(http, "Bye", key="once")
        opened = [message("user", "a"), message("assistant", "b"), message("user", "Hello")]
        other_history = await ask(http, opened, key="once")
        third = (await ask(http, "More", key="twice", previous_response_id=first["id"])).json()
        fourth = (await ask(http, "More", key="twice", previous_response_id=first["id"])).json()
        num_asked = len(server.engine.requests)
    assert (first, third, num_asked) == (second, fourth, 2)
    for refused in (other, other_history):
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "idempotency_conflict")


async def test_stream_of_a_response_that_is_over(real):
    """A repeated key streams what was said at once, to the same end."""
    async with real() as server, server.http({"Idempotency-Key": "k"}) as http:
        first, second = await events_of(http), await events_of(http)
        assert len(server.engine.requests) == 1
    assert second[-1]["response"] == first[-1]["response"]
    assert "".join(event.get("delta", "") for event in second) == "Well said."


@pytest.mark.parametrize("method", ["GET", "cancel", "input_items", "previous"])
@pytest.mark.parametrize("stranger", [True, False])
async def test_other_tenants_responses(real, method, stranger):
    """A response is its tenant's only, and an unknown one is no different."""
    async with real(api_keys=KEYS) as server, server.http(ALICE) as alice, server.http(BOB) as bob:
        response_id = (await ask(alice)).json()["id"]
        response_id = response_id if stranger else response_id[:-1] + ("0" if response_id[-1] != "0" else "1")
        http = bob if stranger else alice
        path = f"{PATH}/{response_id}"
        answer = await {
            "GET": lambda: http.get(path),
            "cancel": lambda: http.post(f"{path}/cancel"),
            "input_items": lambda: http.get(f"{path}/input_items"),
            "previous": lambda: ask(http, previous_response_id=response_id),
        }[method]()
        error = answer.json()["error"]
    param = "previous_response_id" if method == "previous" else "response_id"
    assert (answer.status_code, error["code"], error["param"]) == (404, "response_not_found", param)


@pytest.mark.parametrize("key", [None, "once"])
async def test_refused_response_leaves_no_session(real, key):
    """A response that is refused when its session is there already takes that with it, unless a key may find it."""
    async with real() as server, server.http() as http:
        refused = await ask(http, "long " * 5000, key=key)
        sessions = (await http.get("/v1/sessions")).json()["data"]
        again = await ask(http, "long " * 5000, key=key)
    assert refused.json()["error"]["code"] == again.json()["error"]["code"] == "context_length_exceeded"
    assert len(sessions) == (0 if key is None else 1)


async def test_server_ends_under_a_stored_response(real):
    """Who reads a stored response when the server ends is told so, and the response is left for the next server."""
    async with real(gated=True) as server, server.http() as http:
        server.engine.allow(2)
        streaming = asyncio.create_task(events_of(http))
        waiting = asyncio.create_task(ask(http))
        await until(lambda: server.services.sessions.num_running == 2 and server.services.hub.num_connections == 2)
        await server.services.hub.close_all(1012, "the server is shutting down", 5)
        (*_, last), answer = await streaming, await waiting
        num_running = server.services.sessions.num_running
    assert (last["type"], last["code"]) == ("error", "server_draining")
    assert (answer.status_code, answer.json()["error"]["code"], num_running) == (503, "server_draining", 2)


async def test_deleted_session(real):
    """With its session a response is gone, also from under a stream."""
    async with real(gated=True) as server, server.http() as http:
        server.engine.allow(2)
        streaming = asyncio.create_task(events_of(http))
        await until(lambda: server.services.sessions.num_running)
        (session,) = (await http.get("/v1/sessions")).json()["data"]
        await http.delete(f"/v1/sessions/{session['id']}")
        events = await streaming
        missing = await http.get(f"{PATH}/resp_{session['id'][5:]}{session['active_response_id'][5:]}")
    assert events[-1]["type"] in ("response.incomplete", "error")
    assert missing.status_code == 404


async def test_turns_of_other_surfaces_are_responses(real):
    """A turn that was sent to the session itself is found and gone on from like any other."""
    async with real() as server, server.http() as http:
        session_id = (await http.post("/v1/sessions", json={"instructions": "Be kind."})).json()["id"]
        turn = (await http.post(f"/v1/sessions/{session_id}/responses", json={"input": "Hi"})).json()
        response_id = f"resp_{session_id[5:]}{turn['response']['id'][5:]}"
        body = (await http.get(f"{PATH}/{response_id}")).json()
        more = {"previous_response_id": response_id, "instructions": "Be kind."}
        second = (await ask(http, "More", **more)).json()
    assert (body["status"], body["instructions"]) == ("completed", "Be kind.")
    assert private_ids(second["id"], "id")[0] == session_id


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ({}, [4, 3, 2, 1, 0]),
        ({"order": "asc"}, [0, 1, 2, 3, 4]),
        ({"order": "asc", "limit": 2}, [0, 1]),
        ({"limit": 2, "after": 3}, [2, 1]),
        ({"after": 0}, []),
    ],
)
async def test_input_items_pages(real, query, ids):
    """Items come newest first or in order, a page at a time."""
    texts = ["a", "b", "c", "d", "e"]
    said = [message(("user", "assistant")[index % 2], text) for index, text in enumerate(texts)]
    async with real() as server, server.http() as http:
        path = f"{PATH}/{(await ask(http, said)).json()['id']}/input_items"
        items = (await http.get(path, params={"order": "asc"})).json()["data"]
        if "after" in query:
            query = {**query, "after": items[query["after"]]["id"]}
        page = (await http.get(path, params=query)).json()
    expected = [items[index]["id"] for index in ids]
    assert [item["id"] for item in page["data"]] == expected
    assert (page["first_id"], page["last_id"]) == ((expected[0], expected[-1]) if expected else (None, None))
    assert page["has_more"] == (bool(ids) and len(ids) < 5 and ids[-1] not in (0, 4))


@pytest.mark.parametrize(
    ("path", "query", "code", "param"),
    [
        ("", {"stream": "true"}, "not_supported", "stream"),
        ("", {"include[]": "x"}, "not_supported", "include[]"),
        ("", {"starting_after": "3"}, "not_supported", "starting_after"),
        ("", {"streem": "x"}, "invalid_value", "streem"),
        ("/input_items", {"limit": "0"}, "invalid_value", "limit"),
        ("/input_items", {"order": "up"}, "invalid_value", "order"),
        ("/input_items", {"after": "msg_x"}, "invalid_value", "after"),
    ],
)
async def test_queries_refused(real, path, query, code, param):
    """A query that cannot be carried out is refused by name."""
    async with real() as server, server.http() as http:
        response_id = (await ask(http)).json()["id"]
        answer = await http.get(f"{PATH}/{response_id}{path}", params=query)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": None}, "missing_field", "input"),
        ({"input": ""}, "invalid_value", "input"),
        ({"input": 5}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": [message("user", "")]}, "invalid_value", "input.0.content"),
        ({"input": [message("user", "a"), message("assistant", "b")]}, "invalid_value", "input"),
        ({"input": [message("user", "a"), message("user", "b")]}, "not_supported", "input"),
        ({"input": [message("user", "a"), message("system", "b"), message("user", "c")]}, "not_supported", "input"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "not_supported", "input.0.type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "not_supported", "input.0.type"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "not_supported", "input.0.type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "not_supported",
            "input.0.content.0.type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "not_supported",
            "input.0.content.0.type",
        ),
        ({"background": True}, "not_supported", "background"),
        ({"background_options": {"completion_window": "2h"}}, "not_supported", "background_options"),
        ({"context_management": [{"type": "compaction"}]}, "not_supported", "context_management"),
        ({"conversation": "conv_1"}, "not_supported", "conversation"),
        ({"include": ["message.output_text.logprobs"]}, "not_supported", "include"),
        ({"max_tool_calls": 1}, "not_supported", "max_tool_calls"),
        ({"moderation": {"model": "m"}}, "not_supported", "moderation"),
        ({"prompt": {"id": "p"}}, "not_supported", "prompt"),
        ({"prompt_cache_retention": "24h"}, "not_supported", "prompt_cache_retention"),
        ({"prompt_cache_options": {"mode": "implicit"}}, "not_supported", "prompt_cache_options"),
        ({"reasoning": {"effort": "low"}}, "not_supported", "reasoning"),
        ({"service_tier": "flex"}, "not_supported", "service_tier"),
        ({"stream_options": {"include_obfuscation": True}}, "not_supported", "stream_options"),
        ({"text": {"format": {"type": "json_object"}}}, "not_supported", "text"),
        ({"text": {"verbosity": "low"}}, "not_supported", "text"),
        ({"tool_choice": "required"}, "not_supported", "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "not_supported", "tools"),
        ({"top_logprobs": 2}, "not_supported", "top_logprobs"),
        ({"truncation": "auto"}, "not_supported", "truncation"),
        ({"metadata": {"a": 1}}, "invalid_value", "metadata"),
        ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
        ({"previous_response_id": ""}, "invalid_value", "previous_response_id"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"model": "another"}, "model_not_found", "model"),
    ],
)
def test_refused(fields, code, param):
    """What cannot be carried out is refused with the field's name."""
    with pytest.raises(BadRequest) as refusal:
        read_response({"input": "Hello", **fields}, model="fake")
    assert (refusal.value.code, refusal.value.param) == (code, param)


async def test_system_behind_a_response(real):
    """The system cannot speak up behind a response; a key that is too long is refused as well."""
    async with real() as server, server.http() as http:
        first = (await ask(http)).json()
        late = await ask(http, [message("system", "x"), message("user", "y")], previous_response_id=first["id"])
        long = await ask(http, key="k" * 65)
    assert (late.status_code, late.json()["error"]["param"]) == (400, "input.0.role")
    assert (long.status_code, long.json()["error"]["param"]) == (400, "key")


def test_harmless_fields():
    """Fields that ask for what is done anyway are taken, and those of no use here too."""
    harmless = {
        "background": False,
        "include": [],
        "parallel_tool_calls": False,
        "service_tier": "auto",
        "stream_options": {"include_obfuscation": False},
        "text": {"format": {"type": "text"}},
        "tools": [],
        "tool_choice": "auto",
        "truncation": "disabled",
        "safety_identifier": "me",
        "prompt_cache_key": "mine",
        "previous_response_id": None,
    }
    wanted = read_response({"input": "Hello", **harmless}, model="fake")
    assert (wanted.store, wanted.stream, wanted.sampling.temperature) == (True, False, 1.0)
