"""`POST /v1/completions` over an engine that says what the test wants, through a real HTTP server."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any

import pytest

from chatserve.engine.api import Tokens
from chatserve.errors import Overloaded, Unavailable
from chatserve.server.openai.completing import Completions
from chatserve.server.openai.completion_body import read_body
from tests.server.real import TEXT, TOKENIZER
from tests.sessions.fakes import FakeEngine

EOS = TOKENIZER.eos_token_id


def spelling(text: str, *, end: bool = True):
    """Chooses the next token of `text`, byte by byte, behind a prompt of one token."""
    ids = [*TOKENIZER.encode(text, add_special_tokens=False), *([EOS] if end else [])]
    return lambda token_ids: ids[(len(token_ids) - 1) % len(ids)]


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": [5], "temperature": 0, "max_tokens": 64, **fields}


def chunks_of(text: str) -> list[Any]:
    """The events of a stream, each parsed but for the last word."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def post(served: Any, **fields: Any) -> Any:
    async with served.http() as http:
        return await http.post("/v1/completions", json=body(**fields), timeout=20)


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def test_whole(serve):
    """Without a stream: text, why it ended, and what it cost."""
    served = await serve(engine=FakeEngine(spelling("Hi Zorp")))
    answer = (await post(served, model="fake")).json()
    choice = {"index": 0, "text": "Hi Zorp", "logprobs": None, "finish_reason": "stop"}
    assert (answer["object"], answer["model"], answer["choices"]) == ("text_completion", "fake", [choice])
    num_tokens = len(served.engine.requests[0].stop_token_ids) + len(TOKENIZER.encode("Hi Zorp"))
    assert answer["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": num_tokens,
        "total_tokens": 1 + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_stream(serve):
    """A stream says the same in pieces, then why it ended, then that it is done."""
    served = await serve(engine=FakeEngine(spelling("Hi Zorp")))
    response = await post(served, stream=True)
    *chunks, done = chunks_of(response.text)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hi Zorp"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["id"].startswith("cmpl-")
    assert all("usage" not in chunk and "token_ids" not in chunk["choices"][0] for chunk in chunks)


async def test_stream_with_usage_and_ids(serve):
    """On request each chunk names its tokens, the first one the prompt's, and a last one without choices the usage."""
    served = await serve(engine=FakeEngine(spelling("Hi Zorp")))
    response = await post(served, stream=True, stream_options={"include_usage": True}, return_token_ids=True)
    *chunks, last, done = chunks_of(response.text)
    ids = [token_id for chunk in chunks for token_id in chunk["choices"][0]["token_ids"]]
    assert ids == [*TOKENIZER.encode("Hi Zorp", add_special_tokens=False), EOS]
    assert [chunk["choices"][0].get("prompt_token_ids") for chunk in chunks] == [[5]] + [None] * (len(chunks) - 1)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"], done) == ([], len(ids), "[DONE]")


async def test_whole_with_ids(serve):
    """Without a stream the ids stand beside the text."""
    served = await serve(engine=FakeEngine(spelling("Zorp", end=False)))
    choice = (await post(served, return_token_ids=True, max_tokens=2)).json()["choices"][0]
    assert choice["prompt_token_ids"] == [5]
    assert choice["token_ids"] == TOKENIZER.encode("Zorp", add_special_tokens=False)[:2]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string(serve, stream):
    """A stop string ends the text before it, and the engine is told to end the request."""
    engine = FakeEngine(spelling("one two three", end=False), pace_s=0.001)
    served = await serve(engine=engine)
    response = await post(served, stop=" thr", stream=stream, max_tokens=4000)
    chunks = chunks_of(response.text)[:-1] if stream else [response.json()]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one two"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert engine.held == {}


async def test_text_held_back_for_a_stop_string(serve):
    """What began a stop string and was none comes with the end."""
    served = await serve(engine=FakeEngine(spelling("so it goes")))
    chunks = chunks_of((await post(served, stop=["goes on"], stream=True)).text)[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "so it goes"


async def test_engine_is_asked(serve):
    """Prompt, sampling and limits reach the engine; nothing of the completion is held after it."""
    engine = FakeEngine(spelling("x"))
    served = await serve(engine=engine)
    await post(served, prompt="Hi", temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, seed=7, max_tokens=10_000)
    request = engine.requests[0]
    assert list(request.token_ids) == TOKENIZER.encode("Hi")
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.5, 0.9, 0)
    assert (request.sampling.min_p, request.sampling.seed, request.tenant) == (0.1, 7, "local")
    assert request.max_output_tokens == engine.info.max_context - len(request.token_ids)
    assert list(request.stop_token_ids) == [EOS]
    assert engine.held == {}


async def test_ignore_eos(serve):
    """With `ignore_eos` an end token is one like any other."""
    served = await serve(engine=FakeEngine(lambda token_ids: EOS))
    answer = (await post(served, ignore_eos=True, max_tokens=5)).json()
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (5, "length")


async def test_control_tokens_in_a_text_prompt(serve):
    """A text is a whole prompt: control tokens in it are tokens, and no template is put around it."""
    engine = FakeEngine(spelling("x"))
    await post(await serve(engine=engine), prompt=["<|im_start|>user\nHi"])
    prompt = list(engine.requests[0].token_ids)
    assert prompt == TOKENIZER.encode("<|im_start|>user\nHi")
    assert TOKENIZER.convert_tokens_to_ids("<|im_start|>") in prompt


async def test_ids_beyond_the_tokenizer(serve):
    """A model may have more ids than its tokenizer: those are shown as U+FFFD, and nothing fails."""
    served = await serve(engine=FakeEngine(lambda token_ids: 511))
    answer = (await post(served, return_token_ids=True, max_tokens=3)).json()["choices"][0]
    assert (answer["token_ids"], answer["text"]) == ([511] * 3, "\ufffd" * 3)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": None}, "missing_field", "prompt"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [512]}, "invalid_value", "prompt"),
        ({"prompt": [-1]}, "invalid_value", "prompt"),
        ({"prompt": [1.5]}, "invalid_value", "prompt"),
        ({"prompt": [5] * 4096}, "context_length_exceeded", "prompt"),
        ({"prompt": ["a", "b"]}, "not_supported", "prompt"),
        ({"prompt": [[1], [2]]}, "not_supported", "prompt"),
        ({"n": 2}, "not_supported", "n"),
        ({"best_of": 2}, "not_supported", "best_of"),
        ({"echo": True}, "not_supported", "echo"),
        ({"logprobs": 0}, "not_supported", "logprobs"),
        ({"suffix": "x"}, "not_supported", "suffix"),
        ({"presence_penalty": 0.5}, "not_supported", "presence_penalty"),
        ({"frequency_penalty": -1}, "not_supported", "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "not_supported", "logit_bias"),
        ({"temprature": 1}, "invalid_value", "temprature"),
        ({"temperature": "hot"}, "invalid_value", "temperature"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"model": "another"}, "model_not_found", "model"),
    ],
)
async def test_refused(serve, fields, code, param):
    """What cannot be carried out is refused with the field's name, and never reaches the engine."""
    engine = FakeEngine(spelling("x"))
    response = await post(await serve(engine=engine), **fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)
    assert engine.requests == []


async def test_harmless_fields(serve):
    """Fields that ask for what is done anyway are taken."""
    harmless = {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": None, "logit_bias": {}, "user": "me"}
    response = await post(await serve(engine=FakeEngine(spelling("x"))), **harmless, presence_penalty=0.0, stop=[])
    assert response.status_code == 200


def test_defaults():
    """Without further words: 16 tokens at temperature 1, a seed of its own, no stream."""
    first, second = [read_body({"prompt": "x"}, model="m", vocab_size=9)[1] for _ in range(2)]
    assert (first.max_tokens, first.sampling.temperature, first.sampling.top_p, first.stream) == (16, 1.0, 1.0, False)
    assert first.sampling.seed != second.sampling.seed


@pytest.mark.parametrize("stream", [False, True])
async def test_queue_full(serve, stream):
    """A refusal before the first token has its status, also where a stream was asked for."""
    engine = FakeEngine(spelling("x"))
    engine.failure = Overloaded("too many wait", retry_after_ms=1000)
    response = await post(await serve(engine=engine), stream=stream)
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert response.json()["error"]["code"] == "queue_full"


async def test_failure_in_the_stream(serve):
    """Once a chunk is out a failure is an event, and the stream ends without [DONE]."""
    engine = FakeEngine(spelling("Zorp", end=False), gated=True)
    engine.allow()
    served = await serve(engine=engine)
    async with served.http() as http, http.stream("POST", "/v1/completions", json=body(stream=True)) as response:
        lines = response.aiter_lines()
        first = json.loads((await anext(lines)).removeprefix("data: "))
        engine.failure = Unavailable("the engine stopped", code="server_interrupted")
        engine.allow()
        rest = [line async for line in lines if line]
    assert first["choices"][0]["text"]
    assert [json.loads(line.removeprefix("data: "))["error"]["code"] for line in rest] == ["server_interrupted"]


@pytest.mark.parametrize("fault", [RuntimeError("secret inside"), Unavailable("the engine stopped")])
async def test_failure_before_the_stream(serve, fault):
    """A fault before the first token is an HTTP error."""
    engine = FakeEngine(spelling("x"))
    engine.failure = fault
    response = await post(await serve(engine=engine), stream=True)
    assert response.status_code in (500, 503)
    assert "secret" not in response.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 3])
async def test_disconnect_cancels(serve, stream, num_tokens):
    """A client that goes away ends its completion, waiting or running, streamed or not."""
    engine = FakeEngine(spelling("Zorp", end=False), gated=True)
    served = await serve(engine=engine)
    async with served.http() as http:
        engine.allow(num_tokens)
        asking = asyncio.create_task(http.post("/v1/completions", json=body(stream=stream)))
        await until(lambda: engine.held and len(next(iter(engine.held.values()))) >= num_tokens)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: not engine.held)


async def test_draining(serve):
    """A server on its way out takes no more, lets running completions end for a while, then ends them."""
    engine = FakeEngine(spelling("Zorp", end=False), gated=True)
    served = await serve(engine=engine)
    async with served.http() as http:
        running = asyncio.create_task(http.post("/v1/completions", json=body()))
        await until(lambda: engine.held)
        await served.services.completions.drain(0.05)
        refused = await http.post("/v1/completions", json=body())
        ended = await running
    assert [answer.status_code for answer in (refused, ended)] == [503, 503]
    assert refused.json()["error"]["code"] == ended.json()["error"]["code"] == "server_draining"
    assert refused.headers["retry-after"] == "1"


async def test_drain_waits():
    """Draining returns when the last completion has ended by itself."""
    engine = FakeEngine(spelling("Zorp"), pace_s=0.01)
    completions = Completions(engine, TEXT)
    completion = await completions.prepare_raw("local", "cmpl-1", *read_body(body(), model="fake", vocab_size=512))
    reading = asyncio.create_task(collect(completions.run(completion)))
    await until(lambda: engine.held)
    await completions.drain(5)
    assert "".join(piece.text for piece in await reading) == "Zorp"


@pytest.mark.parametrize(
    ("fields", "num_read", "status", "num_tokens"),
    [({}, 99, "completed", 5), ({"max_tokens": 2}, 99, "incomplete", 2), ({}, 3, "cancelled", 3)],
)
async def test_end_is_told(fields, num_read, status, num_tokens):
    """Each completion that began is counted once, with what it cost, however it ended."""
    told: list[Any] = []
    engine = FakeEngine(spelling("Zorp", end=True))
    completions = Completions(engine, TEXT, told.append)
    prompt, wanted = read_body(body(**fields), model="fake", vocab_size=512)
    completion = await completions.prepare_raw("local", "cmpl-1", prompt, wanted)
    async with aclosing(completions.run(completion)) as pieces:
        async for _ in pieces:
            num_read -= 1
            if not num_read:
                break
    (response,) = told
    assert (response["status"], response["usage"]["output_tokens"]) == (status, num_tokens)
    assert response["usage"]["input_tokens"] == 1
    assert response["timings"]["prefill_ms"] == 2.0
    assert completions.num_running == 0


async def test_what_never_began_is_not_told():
    """A completion that the engine refuses is not counted."""
    told: list[Any] = []
    engine = FakeEngine(spelling("x"), gated=True)
    completions = Completions(engine, TEXT, told.append)
    engine.generate = refuse
    completion = await completions.prepare_raw("local", "c", *read_body(body(), model="fake", vocab_size=512))
    with pytest.raises(Overloaded):
        await collect(completions.run(completion))
    assert told == []


def refuse(request: Any) -> Any:
    raise Overloaded("too many wait")


async def collect(pieces) -> list[Any]:
    return [piece async for piece in pieces]


async def test_key(serve):
    """A key opens its tenant's prefixes and no others."""
    engine = FakeEngine(spelling("x"))
    served = await serve(engine=engine, api_keys=("alice=alices-key",))
    async with served.http() as http:
        without = await http.post("/v1/completions", json=body())
        right = await http.post("/v1/completions", json=body(), headers={"Authorization": "Bearer alices-key"})
    assert (without.status_code, right.status_code) == (401, 200)
    assert [request.tenant for request in engine.requests] == ["alice"]


async def test_tokens_together_are_one_chunk(serve):
    """Tokens that arrive together make one chunk."""
    engine = FakeEngine(spelling("a"))
    engine.extra = [Tokens(TOKENIZER.encode("bcd", add_special_tokens=False))]
    chunks = chunks_of((await post(await serve(engine=engine), stream=True)).text)[:-1]
    assert [chunk["choices"][0]["text"] for chunk in chunks][:2] == ["bcd", "a"]
