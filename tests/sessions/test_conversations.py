"""Whole conversations over stored sessions: whose ids a prompt begins with, and sessions that begin with messages."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from chatserve.errors import BadRequest, NotFound
from chatserve.sessions.opening import Opening
from chatserve.text.pipeline import PathMessage, TextPipeline
from tests.sessions.conftest import EOS, LIMITS, TOKENIZER, Chat, Stage, command, pseudo_random_token, saying
from tests.sessions.fakes import FakeEngine
from tests.text.tokenizers import sentencepiece

STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}"
    "<s>{{ m.content }}</s>{% endfor %}"
)


def spelling(*replies: str) -> Callable[[Sequence[int]], int]:
    """As `saying`, but letter by letter: ids that encoding the same text does not give."""
    spoken = [[*map(TOKENIZER.convert_tokens_to_ids, reply), EOS] for reply in replies]
    opening = TOKENIZER.encode("<|im_start|>assistant\n", add_special_tokens=False)

    def choose(token_ids: Sequence[int]) -> int:
        starts = [i for i in range(len(token_ids)) if list(token_ids[i : i + len(opening)]) == opening]
        return spoken[len(starts) - 1][len(token_ids) - starts[-1] - len(opening)]

    return choose


def dialogue(*texts: str) -> list[PathMessage]:
    """A user's and an assistant's messages in turns."""
    return [PathMessage(("user", "assistant")[index % 2], text, ()) for index, text in enumerate(texts)]


async def prompt(chat: Chat, *texts: str, instructions: str = "") -> list[int]:
    async with asyncio.timeout(5):
        while chat.manager.num_running:  # a reply can be found again as soon as its turn has ended
            await asyncio.sleep(0)
    return await chat.manager.conversations.prompt(chat.tenant, dialogue(*texts), instructions=instructions)


def templated(*texts: str) -> list[int]:
    messages = [{"role": message.role, "content": message.text} for message in dialogue(*texts)]
    return list(TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


async def test_prompt_begins_with_stored_ids(stage: Stage) -> None:
    """The longest stored beginning gives its ids; without one the prompt is the template's."""
    engine = FakeEngine(spelling("theres", "others"))
    chat = await stage.start(engine)
    session_id = await chat.create()
    await chat.ask(session_id, "hi")
    await chat.ask(session_id, "so")
    stored = [*engine.held[session_id], EOS]
    found = await prompt(chat, "hi", "theres", "so", "others", "and")
    assert found[: len(stored)] == stored
    assert found != templated("hi", "theres", "so", "others", "and")
    assert TOKENIZER.decode(found) == TOKENIZER.decode(templated("hi", "theres", "so", "others", "and"))
    shorter = await prompt(chat, "hi", "theres", "but")
    assert shorter[: len(engine.requests[0].token_ids) + 7] == stored[: len(engine.requests[0].token_ids) + 7]
    assert await prompt(chat, "Hi", "theres", "so") == templated("Hi", "theres", "so")


async def test_histories_survive_a_restart(stage: Stage) -> None:
    """The next process finds them in the store, and so it does where the store was away at first."""
    first = await stage.start(FakeEngine(spelling("theres")))
    await first.ask(await first.create(), "hi")
    expected = await prompt(first, "hi", "theres", "so")
    await first.manager.close()
    line = stage.line()
    second = await stage.start(FakeEngine(spelling("theres")), line)
    line.away = True
    assert await prompt(second, "hi", "theres", "so") == templated("hi", "theres", "so") != expected
    line.away = False
    assert await prompt(second, "hi", "theres", "so") == expected


async def test_histories_are_bounded(stage: Stage) -> None:
    """Beyond the bound the oldest are forgotten; they are rendered then."""
    chat = await stage.start(FakeEngine(spelling("theres")), limits=dataclasses.replace(LIMITS, max_histories=1))
    await prompt(chat, "x")
    for text in ("hi", "ho"):
        await chat.ask(await chat.create(), text)
    assert await prompt(chat, "hi", "theres", "so") == templated("hi", "theres", "so")
    assert await prompt(chat, "ho", "theres", "so") != templated("ho", "theres", "so")


async def test_roles_that_the_template_refuses(stage: Stage) -> None:
    """A template that raises for an order of roles makes a refusal that names the field, no fault."""
    tokenizer = sentencepiece(STRICT, legacy=False)
    chat = await stage.start(FakeEngine(pseudo_random_token), text=TextPipeline(tokenizer, [2]))
    said = dialogue("a", "b", "c")
    with pytest.raises(BadRequest) as refusal:
        await chat.manager.conversations.prompt("t", [*said, said[0]], instructions="", param="input")
    assert (refusal.value.code, refusal.value.param) == ("not_supported", "input")


async def test_begin_with_messages(stage: Stage) -> None:
    """A session of messages that were said elsewhere goes on as if they had been said in it."""
    engine = FakeEngine(saying("", "Fine"))
    chat = await stage.start(engine)
    begin = command("session.create", instructions="Be kind.")
    opening = Opening(said=dialogue("hi", "Hello"))
    view, duplicate = await chat.manager.conversations.begin("t", begin, opening)
    again, is_again = await chat.manager.conversations.begin("t", begin, opening)
    assert (duplicate, is_again, again["id"]) == (False, True, view["id"])
    terminal = await chat.ask(view["id"], "how are you")
    assert terminal["response"]["text"] == "Fine"
    system = {"role": "system", "content": "Be kind."}
    said = [{"role": m.role, "content": m.text} for m in dialogue("hi", "Hello", "how are you")]
    expected = TOKENIZER.apply_chat_template([system, *said], add_generation_prompt=True, return_dict=False)
    assert list(engine.requests[0].token_ids) == list(expected)
    state = await chat.state(view["id"])
    assert [message["content"][0]["text"] for message in state["messages"]] == ["hi", "Hello", "how are you", "Fine"]


async def test_begin_behind_a_message_with_other_instructions(stage: Stage) -> None:
    """The path is copied with its replies' own ids; the new instructions stand before it, the old session stays."""
    engine = FakeEngine(spelling("theres", "others"))
    chat = await stage.start(engine)
    session_id = await chat.create(instructions="Be kind.")
    reply_id = (await chat.ask(session_id, "hi"))["response"]["message_id"]
    begin = command("session.create", instructions="Be brief.")
    view, _ = await chat.manager.conversations.begin("t", begin, Opening(session_id, reply_id))
    await chat.ask(view["id"], "so")
    ids = list(engine.requests[-1].token_ids)
    assert TOKENIZER.decode(ids).count("Be brief.") == 1
    assert "Be kind." not in TOKENIZER.decode(ids)
    spelled = [*map(TOKENIZER.convert_tokens_to_ids, "theres"), EOS]
    assert any(ids[i : i + len(spelled)] == spelled for i in range(len(ids)))
    assert len((await chat.state(session_id))["messages"]) == 2


@pytest.mark.parametrize("missing", ["session", "message", "tenant"])
async def test_begin_behind_nothing(stage: Stage, missing: str) -> None:
    """A session or message that there is not, or that is another tenant's, cannot be gone on from."""
    chat = await stage.start(FakeEngine(saying("Hello")))
    session_id = await chat.create()
    reply_id = (await chat.ask(session_id, "hi"))["response"]["message_id"]
    opening = Opening(
        "sess_none" if missing == "session" else session_id, "msg_x" if missing == "message" else reply_id
    )
    with pytest.raises(NotFound):
        await chat.manager.conversations.begin(
            "other" if missing == "tenant" else "t", command("session.create"), opening
        )


async def test_request_is_kept_over_a_crash(stage: Stage) -> None:
    """What a surface wants to find again with its response is there while it runs, after a crash, and at the end."""
    request: dict[str, Any] = {"asked": {"metadata": {"a": "b"}}}
    line, engine = stage.line(), FakeEngine(saying("Hello there"), gated=True)
    chat = await stage.start(engine, line)
    session_id = await chat.create()
    turn = command("response.create", session_id=session_id, input="hi")
    accepted = await chat.manager.create_response("t", turn, request)
    find = chat.manager.conversations.find_response
    running = await find("t", session_id, accepted.response_id)
    assert (running.is_running, running.reply.request) == (True, request)
    line.cut.set()
    second = await stage.start(FakeEngine(saying("Hello there")))
    await second.events(session_id)
    ended = await second.manager.conversations.find_response("t", session_id, accepted.response_id)
    assert (ended.is_running, ended.reply.text, ended.reply.request) == (False, "Hello there", request)
    assert [message.text for message in ended.path] == ["hi"]


async def test_same_key_for_another_request(stage: Stage) -> None:
    """A repeated key with another request is a conflict, with the same it is the same response."""
    chat = await stage.start(FakeEngine(saying("Hello")))
    session_id = await chat.create()
    turn = command("response.create", session_id=session_id, input="hi")
    first = await chat.manager.create_response("t", turn, {"body": "1"})
    second = await chat.manager.create_response("t", turn, {"body": "1"})
    assert (first.response_id, second.duplicate) == (second.response_id, True)
    with pytest.raises(Exception, match="idempotency_conflict"):
        await chat.manager.create_response("t", turn, {"body": "2"})


async def test_find_response(stage: Stage) -> None:
    """A response is found in its session only, and by its own tenant only."""
    chat = await stage.start(FakeEngine(saying("Hello")))
    session_id, other_id = await chat.create(), await chat.create()
    response_id = (await chat.ask(session_id, "hi"))["response"]["id"]
    find = chat.manager.conversations.find_response
    assert (await find("t", session_id, response_id)).inner_id == response_id
    for tenant, session, response in (
        ("t", other_id, response_id),
        ("other", session_id, response_id),
        ("t", session_id, "resp_x"),
    ):
        with pytest.raises(NotFound):
            await find(tenant, session, response)


async def test_prompts_at_the_same_time(stage: Stage) -> None:
    """Requests that come together while the histories are read all find them."""
    first = await stage.start(FakeEngine(spelling("theres")))
    await first.ask(await first.create(), "hi")
    expected = await prompt(first, "hi", "theres", "so")
    second = await stage.start(FakeEngine(spelling("theres")))
    assert await asyncio.gather(*(prompt(second, "hi", "theres", "so") for _ in range(4))) == [expected] * 4
