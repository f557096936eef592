"""One turn after another: its events, what it says, what it reuses, and what each kind of turn hangs on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from chatserve.errors import BadRequest, NotFound
from chatserve.sessions.limits import SessionLimits
from chatserve.text.pipeline import TextPipeline
from tests.sessions.conftest import EOS, LIMITS, TOKENIZER, Stage, pseudo_random_token, saying
from tests.sessions.fakes import FakeEngine
from tests.text.tokenizers import chatml

FORGETS_FIRST = (
    "{% for m in messages %}{% if loop.last or not loop.first %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}<|im_start|>assistant\n"
)


async def test_the_events_of_a_turn_come_in_order(stage: Stage) -> None:
    """User message, response, what was reused, text, whole text, one terminal event; seq without a gap."""
    chat = await stage.start(FakeEngine(saying("Hello there")))
    session_id = await chat.create()
    accepted = await chat.send(session_id, "hi")
    events = await chat.events(session_id)
    assert [event["type"] for event in events] == [
        "session.created",
        "message.created",
        "response.created",
        "response.in_progress",
        "response.output_text.delta",
        "response.output_text.done",
        "response.completed",
    ]
    assert [event["seq"] for event in events] == list(range(1, 8))
    assert {event["session_id"] for event in events} == {session_id}
    assert events[1]["message"]["id"] == accepted.message_id
    assert events[2]["response"]["id"] == accepted.response_id
    assert events[2]["seq"] == accepted.head_seq
    assert events[-1]["response"]["text"] == events[-2]["text"] == "Hello there"


async def test_deltas_carry_their_offsets_and_add_up(stage: Stage) -> None:
    """Offsets count code points; the deltas joined are the whole text."""
    engine = FakeEngine(saying("é😀 and some more words"), gated=True)
    chat = await stage.start(engine, limits=SessionLimits(delta_interval_s=0.0))
    session_id = await chat.create()
    await chat.send(session_id, "hi")
    engine.allow(100)
    events = await chat.events(session_id)
    deltas = [event for event in events if event["type"].endswith("delta")]
    assert [delta["offset"] for delta in deltas] == [
        len("".join(earlier["delta"] for earlier in deltas[:index])) for index in range(len(deltas))
    ]
    assert "".join(delta["delta"] for delta in deltas) == events[-1]["response"]["text"] == "é😀 and some more words"


async def test_stored_ids_are_what_was_sampled(stage: Stage) -> None:
    """The next prompt is the first, the sampled ids with their end token, and the new turn only."""
    engine = FakeEngine(saying("Hello there", "Fine"))
    chat = await stage.start(engine)
    session_id = await chat.create()
    await chat.ask(session_id, "hi")
    await chat.ask(session_id, "how are you")
    first, second = engine.requests
    sampled = [*TOKENIZER.encode("Hello there", add_special_tokens=False), EOS]
    assert second.token_ids[: second.num_history] == [*first.token_ids, *sampled]
    assert TOKENIZER.decode(second.token_ids[second.num_history :]).count("how are you") == 1


async def test_usage_counts_the_whole_prompt_and_the_kept_ids(stage: Stage) -> None:
    """Input is everything the reply was made from; output includes the end token."""
    engine = FakeEngine(saying("Hello there"))
    chat = await stage.start(engine)
    response = (await chat.ask(await chat.create(), "hi"))["response"]
    assert response["usage"]["input_tokens"] == len(engine.requests[0].token_ids)
    assert response["usage"]["output_tokens"] == len(TOKENIZER.encode("Hello there", add_special_tokens=False)) + 1
    assert response["usage"]["total_tokens"] == sum(response["usage"][f"{side}_tokens"] for side in ("input", "output"))
    assert response["timings"]["ttft_ms"] > 0


async def test_a_second_turn_hits_what_the_first_left(stage: Stage) -> None:
    """All tokens but the last sampled one are cached: a hit, without a reason."""
    engine = FakeEngine(saying("Hello there", "Fine"))
    chat = await stage.start(engine)
    session_id = await chat.create()
    first = await chat.ask(session_id, "hi")
    second = await chat.ask(session_id, "how are you")
    assert first["response"]["cache"] == {"result": "miss", "restored_from": None, "reason": "first_turn"}
    assert second["response"]["cache"] == {"result": "hit", "restored_from": "device", "reason": None}
    cached = second["response"]["usage"]["input_tokens_details"]["cached_tokens"]
    assert cached == engine.requests[1].num_history - 1


async def test_an_evicted_history_is_a_miss_that_says_so(stage: Stage) -> None:
    """Nothing held any more: miss, evicted; part of it: partial, evicted."""
    engine = FakeEngine(saying("Hello there", "Fine", "Yes"))
    chat = await stage.start(engine)
    session_id = await chat.create()
    await chat.ask(session_id, "hi")
    engine.held.clear()
    nothing = await chat.ask(session_id, "how are you")
    engine.held[session_id] = engine.held[session_id][:20]
    part = await chat.ask(session_id, "really")
    assert nothing["response"]["cache"] == {"result": "miss", "restored_from": None, "reason": "evicted"}
    assert part["response"]["cache"] == {"result": "partial", "restored_from": "device", "reason": "evicted"}


async def test_a_new_first_message_is_changed_input(stage: Stage) -> None:
    """Editing the first message leaves the template's beginning only."""
    chat = await stage.start(FakeEngine(saying("Hello there")))
    session_id = await chat.create()
    await chat.ask(session_id, "hi")
    edited = await chat.ask(session_id, "good evening", parent_id="root")
    assert edited["response"]["cache"] == {"result": "partial", "restored_from": "device", "reason": "input_changed"}
    messages = (await chat.state(session_id))["messages"]
    assert "parent_id" not in messages[0]
    assert "parent_id" not in messages[2]


async def test_a_template_that_rewrites_history_says_so(stage: Stage) -> None:
    """Where the whole conversation must be rendered anew, what the template changed is named as the reason."""
    text = TextPipeline(chatml(FORGETS_FIRST), [EOS])
    chat = await stage.start(FakeEngine(pseudo_random_token), text=text)
    session_id = await chat.create(params={"max_output_tokens": 5})
    await chat.ask(session_id, "hi")
    second = await chat.ask(session_id, "how are you")
    assert second["response"]["cache"] == {"result": "partial", "restored_from": "device", "reason": "template_changed"}


async def test_an_edit_branches_off_an_older_reply(stage: Stage) -> None:
    """Input with an older parent makes a sibling; the old branch stays, the new one is the head."""
    engine = FakeEngine(saying("One", "Two", "Three"))
    chat = await stage.start(engine)
    session_id = await chat.create()
    first = await chat.ask(session_id, "a")
    await chat.ask(session_id, "b")
    parent_id = first["response"]["message_id"]
    edited = await chat.ask(session_id, "c", parent_id=parent_id)
    state = await chat.state(session_id)
    children = [message for message in state["messages"] if message.get("parent_id") == parent_id]
    assert [child["content"][0]["text"] for child in children] == ["b", "c"]
    assert state["head_id"] == edited["response"]["message_id"]
    assert engine.requests[2].token_ids[: engine.requests[2].num_history] == list(
        engine.requests[1].token_ids[: engine.requests[1].num_history]
    )


async def test_regenerate_answers_the_same_message_with_another_seed(stage: Stage) -> None:
    """No input and a user message as parent: the same prompt, all history, a seed of its own."""
    engine = FakeEngine(saying("One"))
    chat = await stage.start(engine)
    session_id = await chat.create()
    accepted = await chat.send(session_id, "a")
    await chat.events(session_id)
    again = await chat.ask(session_id, parent_id=accepted.message_id)
    first, second = engine.requests
    assert again["response"]["parent_id"] == accepted.message_id
    assert again["response"]["cache"]["result"] == "hit"
    assert list(second.token_ids) == list(first.token_ids)
    assert second.num_history == len(first.token_ids)
    assert second.sampling.seed != first.sampling.seed


async def test_continue_goes_on_with_an_unfinished_reply(stage: Stage) -> None:
    """No input and an incomplete reply as parent: its ids go on, and half a code point becomes whole."""
    whole = "Hello é😀 you"
    ids = TOKENIZER.encode(whole, add_special_tokens=False)
    cut = next(n for n in range(len(ids)) if TOKENIZER.decode(ids[:n]).endswith("\ufffd"))
    engine = FakeEngine(saying(whole))
    chat = await stage.start(engine)
    session_id = await chat.create()
    first = await chat.ask(session_id, "a", max_output_tokens=cut)
    second = await chat.ask(session_id)
    assert first["type"] == "response.incomplete"
    assert first["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert "\ufffd" not in first["response"]["text"] + second["response"]["text"]
    assert first["response"]["text"] + second["response"]["text"] == whole
    assert second["response"]["parent_id"] == first["response"]["message_id"]
    assert list(engine.requests[1].token_ids) == [*engine.requests[0].token_ids, *ids[:cut]]


async def test_a_continued_reply_is_followed_by_a_turn(stage: Stage) -> None:
    """What the two parts said is the history of the next message."""
    engine = FakeEngine(saying("Hello you there", "Fine"))
    chat = await stage.start(engine)
    session_id = await chat.create()
    await chat.ask(session_id, "a", max_output_tokens=2)
    await chat.ask(session_id)
    await chat.ask(session_id, "b")
    assert "assistant\nHello you there<|im_end|>\n<|im_start|>user\nb" in TOKENIZER.decode(engine.requests[2].token_ids)


async def test_token_ids_are_taken_raw(stage: Stage) -> None:
    """An input of ids is the prompt, without any template; its text is shown decoded."""
    engine = FakeEngine(pseudo_random_token)
    chat = await stage.start(engine)
    session_id = await chat.create()
    ids = TOKENIZER.encode("Hello", add_special_tokens=False)
    await chat.send(session_id, input=[{"type": "token_ids", "token_ids": ids}], max_output_tokens=3)
    events = await chat.events(session_id)
    assert list(engine.requests[0].token_ids) == ids
    assert events[1]["message"]["content"] == [{"type": "text", "text": "Hello"}]


async def test_unknown_token_ids_are_refused(stage: Stage) -> None:
    """An id outside the vocabulary is named, and no turn begins."""
    chat = await stage.start(FakeEngine(pseudo_random_token))
    session_id = await chat.create()
    with pytest.raises(BadRequest, match="99999"):
        await chat.send(session_id, input=[{"type": "token_ids", "token_ids": [5, 99999]}])
    assert (await chat.state(session_id))["messages"] == []


async def test_a_prompt_beyond_the_context_is_refused_with_its_numbers(stage: Stage) -> None:
    """Too long a prompt names both lengths and what can be done; nothing is written."""
    chat = await stage.start(FakeEngine(pseudo_random_token, max_context=40))
    session_id = await chat.create()
    with pytest.raises(BadRequest, match=r"has \d+ tokens.*holds 40.*fork.*new session") as refusal:
        await chat.send(session_id, "many words and more of them " * 3)
    assert refusal.value.code == "context_length_exceeded"
    state = await chat.state(session_id)
    assert (state["messages"], state["head_seq"]) == ([], 1)


@pytest.mark.parametrize(("asked", "reason"), [(5, "max_output_tokens"), (4000, "context_window")])
async def test_the_limit_that_ends_a_reply_is_named(stage: Stage, asked: int, reason: str) -> None:
    """A reply ended by what was asked for is told from one ended by the context window."""
    engine = FakeEngine(lambda ids: 70, max_context=100)
    chat = await stage.start(engine)
    terminal = await chat.ask(await chat.create(), "hi", max_output_tokens=asked)
    room = 100 - len(engine.requests[0].token_ids)
    assert terminal["type"] == "response.incomplete"
    assert terminal["response"]["incomplete_details"] == {"reason": reason}
    assert terminal["response"]["usage"]["output_tokens"] == min(asked, room)


async def test_the_engines_own_window_is_named_too(stage: Stage) -> None:
    """An engine that can hold less than it said ends a reply by its window."""
    engine = FakeEngine(lambda ids: 70)
    chat = await stage.start(engine)
    session_id = await chat.create()

    async def ended_by_window(request: Any) -> Any:
        from_engine = [item async for item in FakeEngine.generate(engine, request)]
        for item in from_engine[:-1]:
            yield item
        yield type(from_engine[-1])("context_window", 1.0)

    engine.generate = ended_by_window  # type: ignore[method-assign]
    terminal = await chat.ask(session_id, "hi", max_output_tokens=4)
    assert terminal["response"]["incomplete_details"] == {"reason": "context_window"}


async def test_a_stop_string_ends_the_text_and_is_not_shown(stage: Stage) -> None:
    """The text ends before it though it spans tokens; whole tokens stand, the rest is encoded with the next turn."""
    reply = "Your name is Anna. STOP and more"
    engine = FakeEngine(saying(reply, "Fine"))
    chat = await stage.start(engine)
    session_id = await chat.create()
    ended = await chat.ask(session_id, "a", stop=["na. S", "never"])
    await chat.ask(session_id, "b")
    assert ended["type"] == "response.completed"
    assert ended["response"]["text"] == "Your name is An"
    prompt = TOKENIZER.decode(engine.requests[1].token_ids)
    assert "<|im_start|>assistant\nYour name is An<|im_end|>\n<|im_start|>user\nb<|im_end|>" in prompt
    history = engine.requests[1].token_ids[: engine.requests[1].num_history]
    assert list(history[: len(engine.requests[0].token_ids)]) == list(engine.requests[0].token_ids)


async def test_an_end_token_can_be_ignored(stage: Stage) -> None:
    """With `ignore_eos` the reply goes on behind its end token, which has no text."""
    engine = FakeEngine(lambda ids: EOS if len(ids) % 3 == 0 else 70)
    chat = await stage.start(engine)
    terminal = await chat.ask(await chat.create(), "hi", ignore_eos=True, max_output_tokens=9)
    assert engine.requests[0].stop_token_ids == ()
    assert terminal["response"]["usage"]["output_tokens"] == 9
    assert terminal["response"]["text"] == TOKENIZER.decode([70]) * 6


async def test_params_come_from_the_command_the_session_then_the_server(stage: Stage) -> None:
    """Each setting is taken from the first of the three that gives it."""
    engine = FakeEngine(pseudo_random_token)
    limits = SessionLimits(temperature=0.9, top_p=0.8, top_k=7, max_output_tokens=5)
    chat = await stage.start(engine, limits=limits)
    session_id = await chat.create(params={"top_p": 0.5, "top_k": 3, "seed": 11})
    await chat.ask(session_id, "hi", top_k=2)
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.9, 0.5, 2, 11)
    assert engine.requests[0].max_output_tokens == 5


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, "missing_field"),
        ({"parent_id": "msg_none", "input": "x"}, "message_not_found"),
    ],
)
async def test_a_turn_that_hangs_on_nothing_is_refused(stage: Stage, fields: Any, code: str) -> None:
    """An empty session needs input, and a parent must exist."""
    chat = await stage.start(FakeEngine(saying("One")))
    session_id = await chat.create()
    with pytest.raises((BadRequest, NotFound)) as refusal:
        await chat.send(session_id, **fields)
    assert refusal.value.code == code


async def test_turns_without_meaning_are_refused(stage: Stage) -> None:
    """A complete reply cannot go on, and a user message cannot follow a user message; both say what to do."""
    chat = await stage.start(FakeEngine(saying("One")))
    session_id = await chat.create()
    accepted = await chat.send(session_id, "a")
    await chat.events(session_id)
    with pytest.raises(BadRequest, match="come to its end"):
        await chat.send(session_id)
    with pytest.raises(BadRequest, match="leave 'input' out"):
        await chat.send(session_id, "b", parent_id=accepted.message_id)


async def test_instructions_open_the_first_prompt(stage: Stage) -> None:
    """A session's instructions are its system message, also for a first message that is edited later."""
    engine = FakeEngine(saying("One"))
    chat = await stage.start(engine)
    session_id = await chat.create(instructions="Be kind.")
    await chat.ask(session_id, "a")
    await chat.ask(session_id, "b", parent_id="root")
    for request in engine.requests:
        assert TOKENIZER.decode(request.token_ids).startswith("<|im_start|>system\nBe kind.<|im_end|>")


async def test_a_session_goes_on_with_another_model(stage: Stage) -> None:
    """Ids of a model that is served no more are not given to the new one: the texts are, and the reason is named."""
    engine = FakeEngine(saying("One", "Two"))
    session_id = await (chat := await stage.start(engine)).create()
    await chat.ask(session_id, "a")
    await chat.manager.close()
    other = FakeEngine(saying("One", "Two"))
    other.info = type(other.info)("other", 4096, 512, 4096, 65536, 64, "cpu", "float32", "none")
    chat = await stage.start(other, limits=LIMITS)
    second = await chat.ask(session_id, "b")
    assert second["response"]["cache"]["reason"] == "model_changed"
    assert second["response"]["text"] == "Two"
    prompt = TOKENIZER.decode(other.requests[0].token_ids)
    assert "user\na<|im_end|>\n<|im_start|>assistant\nOne<|im_end|>\n<|im_start|>user\nb<|im_end|>" in prompt


async def test_many_sessions_talk_at_once(stage: Stage) -> None:
    """Forty sessions with three turns each all get their own replies, in order, without gaps."""
    chat = await stage.start(FakeEngine(pseudo_random_token))

    async def talk(number: int) -> None:
        session_id = await chat.create()
        for turn in range(3):
            terminal = await chat.ask(session_id, f"{number} {turn}", max_output_tokens=20)
            assert terminal["response"]["text"]
        assert (await chat.state(session_id))["num_messages"] == 6

    await asyncio.gather(*(talk(number) for number in range(40)))
