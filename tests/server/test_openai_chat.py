"""`POST /v1/chat/completions` over real sessions and an engine that says what the test wants, through a real server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from chatserve.errors import BadRequest, Unavailable
from chatserve.server.openai.chat_body import read_chat
from tests.server.real import ALICE, BOB, EOS, KEYS, TOKENIZER

USER = {"role": "user", "content": "Hello"}
PART = {"type": "text", "text": "Hello"}


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages) or [USER], "temperature": 0, **fields}


async def post(server: Any, body: dict[str, Any], headers: dict[str, str] | None = None) -> Any:
    async with server.http(headers) as http:
        return await http.post("/v1/chat/completions", json=body)


def chunks_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def templated(*messages: dict[str, str]) -> list[int]:
    """What the tokenizer's own template makes of messages."""
    ids = TOKENIZER.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    return list(ids)


async def told(server: Any, *lines: str, headers: dict[str, str] | None = None) -> tuple[str, list[dict[str, str]]]:
    """A stored session that was told these lines, and its conversation as a client would send it."""
    async with server.http(headers) as http:
        session_id = (await http.post("/v1/sessions", json={})).json()["id"]
        for line in lines:
            answer = await http.post(f"/v1/sessions/{session_id}/responses", json={"input": line})
            assert answer.json()["response"]["status"] == "completed"
        messages = (await http.get(f"/v1/sessions/{session_id}")).json()["messages"]
    return session_id, [{"role": m["role"], "content": m["content"][0]["text"]} for m in messages]


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def test_whole(real):
    """Without a stream: the message, why it ended, what it cost; the prompt is what the model's template makes."""
    async with real() as server:
        answer = (await post(server, chat(model="fake"))).json()
        request = server.engine.requests[0]
    assert (answer["object"], answer["model"], answer["id"][:9]) == ("chat.completion", "fake", "chatcmpl-")
    message = {"role": "assistant", "content": "Well said.", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert list(request.token_ids) == templated(USER)
    num_prompt, num_said = len(templated(USER)), len(TOKENIZER.encode("Well said.")) + 1
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_said,
        "total_tokens": num_prompt + num_said,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_stream(real):
    """A stream names the speaker first, then the text, then why it ended, and on request its tokens and the usage."""
    wishes = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    async with real() as server:
        response = await post(server, chat(**wishes))
    *chunks, last, done = chunks_of(response.text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(delta.get("content", "") for delta in deltas) == "Well said."
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    ids = [token_id for chunk in chunks for token_id in chunk["choices"][0]["token_ids"]]
    assert ids == [*TOKENIZER.encode("Well said.", add_special_tokens=False), EOS]
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [templated(USER)] + [None] * (len(chunks) - 1)
    assert (last["choices"], last["usage"]["completion_tokens"], done) == ([], len(ids), "[DONE]")


async def test_settings_reach_the_engine(real):
    """Sampling, bounds and stop strings are the engine's; without a bound the context is it."""
    async with real() as server:
        await post(server, chat(temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, seed=7, max_completion_tokens=2))
        cut = await post(server, chat(stop=["sai"]))
        first, second = server.engine.requests
        room = server.engine.info.max_context - len(second.token_ids)
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed) == (
        0.5,
        0.9,
        3,
        0.1,
        7,
    )
    assert (first.max_output_tokens, second.max_output_tokens) == (2, room)
    assert cut.json()["choices"][0]["message"]["content"] == "Well "


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be kind."}, USER],
        [USER, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Bye"}],
        [USER, USER],
        [USER, {"role": "system", "content": "Be kind."}, USER],
    ],
)
async def test_prompt_is_the_templates(real, messages):
    """Whatever the order of roles: where the template takes it, its own prompt goes to the engine."""
    async with real() as server:
        assert (await post(server, chat(*messages))).status_code == 200
        assert list(server.engine.requests[0].token_ids) == templated(*messages)


async def test_parts_and_messages_of_ours(real):
    """Text parts are one text, and a message goes back in the shape that it came in."""
    reply = {"role": "assistant", "content": "Hi.", "refusal": None, "annotations": [], "tool_calls": None}
    system = {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]}
    async with real() as server:
        answer = await post(server, chat(system, USER, reply, {"role": "user", "content": [PART]}))
        ids = list(server.engine.requests[0].token_ids)
    plain = [{"role": "system", "content": "Be kind."}, USER, {"role": "assistant", "content": "Hi."}, USER]
    assert (answer.status_code, ids) == (200, templated(*plain))


async def test_control_tokens_stay_text(real):
    """A control token that somebody writes is text, as in sessions."""
    async with real() as server:
        await post(server, chat({"role": "user", "content": "a<|im_end|>b"}))
        ids = list(server.engine.requests[0].token_ids)
    assert ids.count(TOKENIZER.convert_tokens_to_ids("<|im_end|>")) == templated(USER).count(EOS)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"messages": None}, "missing_field", "messages"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "Hello"}, "invalid_value", "messages"),
        ({"messages": ["Hello"]}, "invalid_value", "messages.0"),
        ({"messages": [{"role": "system", "content": "x"}]}, "invalid_value", "messages"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "not_supported", "messages.0.role"),
        ({"messages": [{"role": "function", "content": "x"}]}, "not_supported", "messages.0.role"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_value", "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, "invalid_value", "messages.0.content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "invalid_value", "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "invalid_value", "messages.0.content.0.text"),
        (
            {"messages": [{"role": "user", "content": [PART, {"type": "image_url", "image_url": {"url": "x"}}]}]},
            "not_supported",
            "messages.0.content.1.type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "not_supported",
            "messages.0.content.0.type",
        ),
        ({"messages": [{**USER, "name": "Ann"}]}, "not_supported", "messages.0.name"),
        ({"messages": [{**USER, "nmae": "Ann"}]}, "invalid_value", "messages.0.nmae"),
        (
            {"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [{"id": "c"}]}, USER]},
            "not_supported",
            "messages.1.tool_calls",
        ),
        ({"n": 2}, "not_supported", "n"),
        ({"n": True}, "not_supported", "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "not_supported", "tools"),
        ({"tool_choice": "required"}, "not_supported", "tool_choice"),
        ({"functions": [{"name": "f"}]}, "not_supported", "functions"),
        ({"function_call": {"name": "f"}}, "not_supported", "function_call"),
        ({"response_format": {"type": "json_object"}}, "not_supported", "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "not_supported", "response_format"),
        ({"logprobs": True}, "not_supported", "logprobs"),
        ({"top_logprobs": 2}, "not_supported", "top_logprobs"),
        ({"logit_bias": {"5": 1}}, "not_supported", "logit_bias"),
        ({"presence_penalty": 0.5}, "not_supported", "presence_penalty"),
        ({"frequency_penalty": -1}, "not_supported", "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "not_supported", "repetition_penalty"),
        ({"modalities": ["text", "audio"]}, "not_supported", "modalities"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "not_supported", "audio"),
        ({"prediction": {"type": "content", "content": "x"}}, "not_supported", "prediction"),
        ({"store": True}, "not_supported", "store"),
        ({"metadata": {"a": "b"}}, "not_supported", "metadata"),
        ({"reasoning_effort": "low"}, "not_supported", "reasoning_effort"),
        ({"verbosity": "low"}, "not_supported", "verbosity"),
        ({"web_search_options": {}}, "not_supported", "web_search_options"),
        ({"moderation": {"model": "m"}}, "not_supported", "moderation"),
        ({"service_tier": "flex"}, "not_supported", "service_tier"),
        ({"prompt_cache_retention": "24h"}, "not_supported", "prompt_cache_retention"),
        ({"prompt_cache_options": {"mode": "implicit"}}, "not_supported", "prompt_cache_options"),
        ({"temprature": 1}, "invalid_value", "temprature"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "invalid_value", "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "not_supported",
            "stream_options.include_obfuscation",
        ),
        ({"stream": True, "stream_options": {"include": True}}, "invalid_value", "stream_options"),
        ({"model": "another"}, "model_not_found", "model"),
    ],
)
def test_refused(fields, code, param):
    """What cannot be carried out is refused with the field's name."""
    with pytest.raises(BadRequest) as refusal:
        read_chat({**chat(), **fields}, model="fake")
    assert (refusal.value.code, refusal.value.param) == (code, param)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": [{"type": "function"}]}, "not_supported", "tools"),
        ({"messages": [{"role": "user", "content": "long " * 5000}]}, "context_length_exceeded", "messages"),
    ],
)
async def test_refusals_are_openais(real, fields, code, param):
    """A refusal is an error object with its status, and nothing of the request reaches the engine."""
    async with real() as server:
        response = await post(server, {**chat(), **fields})
        error = response.json()["error"]
        assert (response.status_code, error["type"]) == (400, "invalid_request_error")
        assert (error["code"], error["param"]) == (code, param)
        assert server.engine.requests == []


async def test_harmless_fields(real):
    """Fields that ask for what is done anyway are taken, nulls like absent ones."""
    harmless = {
        "n": 1,
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "logprobs": False,
        "top_logprobs": None,
        "modalities": ["text"],
        "store": False,
        "service_tier": "auto",
        "presence_penalty": 0.0,
        "logit_bias": {},
        "stop": [],
        "user": "me",
        "safety_identifier": "me",
        "prompt_cache_key": "mine",
    }
    async with real() as server:
        assert (await post(server, chat(**harmless))).status_code == 200


async def test_stored_tokens_are_used(real):
    """A conversation that goes on from a stored session begins with its very ids, which no text gives back."""
    spelled = [*TOKENIZER.encode("W", add_special_tokens=False), *map(TOKENIZER.convert_tokens_to_ids, "ell")]
    assert spelled != TOKENIZER.encode("Well", add_special_tokens=False)
    async with real(choose=spelling(spelled)) as server:
        _, messages = await told(server, "One", "Two")
        stored = stored_ids(server)
        answer = await post(server, chat(*messages, USER, return_token_ids=True))
    ids = answer.json()["prompt_token_ids"]
    assert messages[1]["content"] == "Well"
    assert ids[: len(stored)] == stored
    assert ids != templated(*messages, USER)
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(templated(*messages, USER))


async def test_stored_beginning_is_enough(real):
    """Turns that the session never saw are rendered behind its ids."""
    spelled = [*TOKENIZER.encode("W", add_special_tokens=False), *map(TOKENIZER.convert_tokens_to_ids, "ell")]
    more = [USER, {"role": "assistant", "content": "Elsewhere."}, {"role": "user", "content": "Bye"}]
    async with real(choose=spelling(spelled)) as server:
        _, messages = await told(server, "One")
        stored = stored_ids(server)
        ids = (await post(server, chat(*messages, *more, return_token_ids=True))).json()["prompt_token_ids"]
    assert ids[: len(stored)] == stored
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(templated(*messages, *more))


@pytest.mark.parametrize("change", ["tenant", "text", "system", "deleted"])
async def test_other_conversations_are_rendered(real, change):
    """Another tenant, another text, other instructions, or a session that was deleted: nothing of it is used."""
    spelled = [*TOKENIZER.encode("W", add_special_tokens=False), *map(TOKENIZER.convert_tokens_to_ids, "ell")]
    async with real(choose=spelling(spelled), api_keys=KEYS) as server:
        session_id, messages = await told(server, "One", headers=ALICE)
        if change == "text":
            messages[0]["content"] = "one"
        if change == "system":
            messages.insert(0, {"role": "system", "content": "Be kind."})
        if change == "deleted":
            async with server.http(ALICE) as http:
                await http.delete(f"/v1/sessions/{session_id}")
        headers = BOB if change == "tenant" else ALICE
        answer = await post(server, chat(*messages, USER, return_token_ids=True), headers)
    assert answer.json()["prompt_token_ids"] == templated(*messages, USER)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 3])
async def test_disconnect_cancels(real, stream, num_tokens):
    """A client that goes away ends its completion, waiting or running, streamed or not."""
    async with real(gated=True) as server, server.http() as http:
        server.engine.allow(num_tokens)
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=chat(stream=stream)))
        held = server.engine.held
        num_prompt = len(templated(USER))
        await until(lambda: held and len(next(iter(held.values()))) >= num_prompt - 1 + num_tokens)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: not held)


async def test_disconnect_within_the_body(real, caplog):
    """A client that goes away before its request is whole is no fault of the server's."""
    async with real() as server:
        host, port = server.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        await writer.wait_closed()
        assert (await post(server, chat())).status_code == 200
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


async def test_failure_in_the_stream(real):
    """Once an event is out a failure is one, and the stream ends without [DONE]."""
    async with real(gated=True) as server, server.http() as http:
        server.engine.allow()
        async with http.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as response:
            lines = (line async for line in response.aiter_lines() if line)
            first = json.loads((await anext(lines)).removeprefix("data: "))
            server.engine.failure = Unavailable("the engine stopped", code="server_interrupted")
            server.engine.allow()
            rest = [json.loads(line.removeprefix("data: ")) async for line in lines]
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert rest[-1]["error"]["code"] == "server_interrupted"


def spelling(token_ids: list[int]) -> Any:
    """Chooses these ids after each generation prompt, then the end."""
    opening = TOKENIZER.encode("<|im_start|>assistant\n", add_special_tokens=False)

    def choose(ids: Any) -> int:
        starts = [i for i in range(len(ids)) if list(ids[i : i + len(opening)]) == opening]
        return [*token_ids, EOS][len(ids) - starts[-1] - len(opening)]

    return choose


def stored_ids(server: Any) -> list[int]:
    """The ids of the session whose turns the engine was asked for: the last prompt and the reply to it."""
    request = server.engine.requests[-1]
    return [*server.engine.held[request.session_id], EOS]
