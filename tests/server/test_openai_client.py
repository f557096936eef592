"""The official `openai` client against a real server with the bundled model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.live import LiveServer

TOLD = "My dog is called Zorp."
ASKED = "What is my dog called?"


def client_of(server: LiveServer, **options: Any) -> OpenAI:
    http = openai.DefaultHttpxClient(trust_env=False, timeout=30)
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http, **options)


@pytest.fixture
def client(live_server: LiveServer) -> Iterator[OpenAI]:
    """A client of the shared server."""
    with client_of(live_server) as client:
        yield client


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def exported_ids(server: LiveServer, session_id: str) -> list[int]:
    """All ids of a session with one branch, from the first message on."""
    messages = server.get(f"/v1/sessions/{session_id}/export").json()["messages"]
    return [token_id for message in messages for token_id in message["token_ids"]]


def test_models(client):
    """The model is listed and found; another one is not."""
    assert [model.id for model in client.models.list()] == ["bundled"]
    assert client.models.retrieve("bundled").owned_by == "chatserve"
    with pytest.raises(openai.NotFoundError) as refusal:
        client.models.retrieve("some/other")
    assert refusal.value.code == "model_not_found"


def test_growing_conversation(client):
    """A conversation that is sent whole each time is remembered, and costs its new tokens only."""
    messages: list[Any] = [user(f"{TOLD} My name is Quilla.")]
    first = client.chat.completions.create(model="bundled", messages=messages, temperature=0)
    messages += [first.choices[0].message.model_dump(), user(ASKED)]
    second = client.chat.completions.create(model="bundled", messages=messages, temperature=0)
    assert "Zorp" in second.choices[0].message.content
    assert second.choices[0].finish_reason == "stop"
    usage = second.usage
    assert usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    assert usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens < 30
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_chat_stream(client):
    """A stream says what the whole answer says, and ends with the usage."""
    wanted = {"model": "bundled", "messages": [user(TOLD)], "temperature": 0}
    whole = client.chat.completions.create(**wanted)
    chunks = list(client.chat.completions.create(**wanted, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], whole.usage.completion_tokens)
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_chat_goes_on_from_a_stored_session(live_server, client):
    """What is sent whole behind a stored session's words begins with that session's ids, all of them cached."""
    first = client.responses.create(model="bundled", input="My name is Zorvin.", temperature=0)
    second = client.responses.create(model="bundled", input=TOLD, previous_response_id=first.id, temperature=0)
    items = client.responses.input_items.list(second.id, order="asc").data
    messages: list[Any] = [{"role": item.role, "content": item.content[0].text} for item in items]
    messages += [{"role": "assistant", "content": second.output_text}, user("What is my name?")]
    answer = client.chat.completions.create(
        model="bundled", messages=messages, temperature=0, extra_body={"return_token_ids": True}
    )
    stored = exported_ids(live_server, f"sess_{second.id[5:31]}")
    assert answer.prompt_token_ids[: len(stored)] == stored
    assert answer.usage.prompt_tokens_details.cached_tokens >= len(stored) - 1
    assert "Zorvin" in answer.choices[0].message.content


def test_completion(client):
    """The older completions work from the same client."""
    answer = client.completions.create(model="bundled", prompt="Hello", max_tokens=3, temperature=0)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_responses(client):
    """A response is made, gone on from, found again, listed with its input, and left alone by a late cancel."""
    first = client.responses.create(model="bundled", input=TOLD, temperature=0, metadata={"topic": "pets"})
    second = client.responses.create(model="bundled", input=ASKED, temperature=0, previous_response_id=first.id)
    assert (first.status, first.metadata) == ("completed", {"topic": "pets"})
    assert "Zorp" in second.output_text
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    assert client.responses.retrieve(second.id) == second
    assert client.responses.cancel(second.id) == second
    items = client.responses.input_items.list(second.id, order="asc").data
    assert [item.content[0].text for item in items] == [TOLD, first.output_text, ASKED]


@pytest.mark.parametrize("store", [True, False])
def test_response_stream(client, store):
    """The client's own accumulation of the events agrees with the final object."""
    wanted = {"model": "bundled", "input": TOLD, "temperature": 0, "store": store}
    with client.responses.stream(**wanted) as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert deltas[-1].snapshot == final.output_text == "".join(event.delta for event in deltas)
    assert (final.status, final.store) == ("completed", store)
    assert final.usage.total_tokens == final.usage.input_tokens + final.usage.output_tokens


def test_cancel_of_a_running_response(client):
    """A running response is cancelled by its id from the first event."""
    stream = client.responses.create(
        model="bundled", input=TOLD, temperature=1, stream=True, extra_body={"ignore_eos": True}
    )
    response_id = next(iter(stream)).response.id
    cancelled = client.responses.cancel(response_id)
    *_, last = stream
    assert (cancelled.status, last.response.status) == ("cancelled", "cancelled")


def test_refusals(client):
    """Refusals are the client's own exceptions, with code and field."""
    tools: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="bundled", messages=[user("x")], tools=tools)
    assert (refusal.value.code, refusal.value.param, refusal.value.type) == (
        "not_supported",
        "tools",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.retrieve("resp_none")
    assert missing.value.code == "response_not_found"


@pytest.mark.soak
def test_responses_survive_a_restart(start_server):
    """After a restart a response is found as it was, gone on from, and its history comes back from disk."""
    with client_of(server := start_server()) as client:
        first = client.responses.create(model="bundled", input=f"Hello! {TOLD}", temperature=0)
    server.stop()
    with client_of(start_server()) as client:
        assert client.responses.retrieve(first.id) == first
        messages: list[Any] = [user(f"Hello! {TOLD}"), {"role": "assistant", "content": first.output_text}, user(ASKED)]
        chat = client.chat.completions.create(model="bundled", messages=messages, temperature=0)
        second = client.responses.create(model="bundled", input=ASKED, temperature=0, previous_response_id=first.id)
    assert chat.choices[0].message.content == second.output_text
    assert "Zorp" in second.output_text
    assert chat.usage.prompt_tokens == second.usage.input_tokens
    assert chat.usage.prompt_tokens_details.cached_tokens > 0
