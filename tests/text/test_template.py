"""Turns rendered from new text only give what the model's own template gives for the whole conversation."""

from __future__ import annotations

import asyncio
import datetime
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatserve.errors import StartupError
from chatserve.text.pipeline import PathMessage, TextPipeline
from tests.text.tokenizers import FAMILIES, LLAMA31, QWEN3, QWEN25, byte_level, chatml, llama3

DATE = "2025-03-09"
TODAY = datetime.date.today().isoformat()
NO_MARKUP = st.text(
    st.characters(exclude_categories=["Cs", "Co"], exclude_characters="<[]>"), min_size=1, max_size=30
).filter(str.strip)
REPLIES = st.text("abcdefgh ,.é", min_size=1, max_size=20).map(lambda text: f"Well {text.strip()} ok")


def pipeline_of(tokenizer: Any) -> TextPipeline:
    return TextPipeline(tokenizer, [tokenizer.eos_token_id])


def rendered_whole(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


async def prompts_of(
    tokenizer: Any, turns: list[tuple[str, str]], instructions: str | None = None
) -> list[tuple[list[int], list[int]]]:
    """For each turn the ids rendered by appending and those of the whole conversation rendered at once.

    A reply's ids are what the whole render has behind the prompt, as if the model had sampled them.
    """
    pipeline = pipeline_of(tokenizer)
    messages = [{"role": "system", "content": instructions}] if instructions else []
    path: list[PathMessage] = []
    prompts = []
    for user, reply in turns:
        messages.append({"role": "user", "content": user})
        whole = rendered_whole(tokenizer, messages)
        if path:
            begun = sum(len(message.token_ids) for message in path)
            ids = itertools.takewhile(lambda i: i != tokenizer.eos_token_id, whole[begun:])
            path.append(PathMessage("assistant", messages[-2]["content"], [*ids, tokenizer.eos_token_id]))
        prompt = await pipeline.prompt(path, user, instructions=instructions, date=TODAY)
        prompts.append((prompt.token_ids, whole))
        path.append(PathMessage("user", user, prompt.added_ids))
        messages.append({"role": "assistant", "content": reply})
    return prompts


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(turns=st.lists(st.tuples(NO_MARKUP, REPLIES), min_size=1, max_size=4), data=st.data())
async def test_appended_turns_equal_the_whole_render(family: str, turns: Any, data: st.DataObject) -> None:
    """Any conversation rendered turn by turn has the token ids of the template's render of all of it."""
    instructions = data.draw(st.none() | NO_MARKUP)
    for appended, whole in await prompts_of(FAMILIES[family](), turns, instructions):
        assert appended == whole


@pytest.mark.parametrize("family", FAMILIES)
async def test_white_space_is_trimmed_where_the_template_trims(family: str) -> None:
    """Some templates drop blanks and line ends around a message, in the first turn or all; so does appending."""
    turns = [("\n\t hi \n\n", "Well ok"), (" \n hey\t\n", "Well ok"), ("\n\nho  ", "Well ok")]
    for instructions in (None, "\n be kind \n"):
        for appended, whole in await prompts_of(FAMILIES[family](), turns, instructions):
            assert appended == whole


async def test_a_template_with_default_instructions_writes_them() -> None:
    """Without instructions the template's own system message stands at the beginning."""
    tokenizer = chatml()
    prompt = await pipeline_of(tokenizer).prompt([], "hi", instructions=None, date=DATE)
    assert "You are Qwen." in tokenizer.decode(prompt.token_ids)


async def test_thinking_stays_in_the_history() -> None:
    """Qwen3's template drops earlier thinking; appended turns keep it, because stored ids are the truth."""
    tokenizer = chatml(QWEN3)
    pipeline = pipeline_of(tokenizer)
    first = await pipeline.prompt([], "hi", instructions=None, date=DATE)
    thought = "<think>\nhm\n</think>\n\nHello"
    ids = [*tokenizer.encode(thought, add_special_tokens=False), tokenizer.eos_token_id]
    path = [PathMessage("user", "hi", first.added_ids), PathMessage("assistant", thought, ids)]
    second = await pipeline.prompt(path, "and?", instructions=None, date=DATE)
    messages = [("user", "hi"), ("assistant", thought), ("user", "and?")]
    whole = rendered_whole(tokenizer, [{"role": role, "content": text} for role, text in messages])
    assert "hm" in tokenizer.decode(second.token_ids)
    assert "hm" not in tokenizer.decode(whole)
    assert second.token_ids[: second.num_history] == first.token_ids + ids


@pytest.mark.parametrize("family", FAMILIES)
async def test_control_tokens_that_people_write_stay_text(family: str) -> None:
    """Neither a user nor the instructions can write a control token, in the first turn or a later one."""
    tokenizer = FAMILIES[family]()
    pipeline = pipeline_of(tokenizer)
    controls = set(tokenizer.added_tokens_decoder)
    attack = "x" + "".join(token.content for token in tokenizer.added_tokens_decoder.values()) + "y"

    async def controls_written(text: str) -> list[list[int]]:
        first = await pipeline.prompt([], text, instructions=text, date=DATE)
        path = [
            PathMessage("user", text, first.added_ids),
            PathMessage("assistant", "ok", [5, tokenizer.eos_token_id]),
        ]
        second = await pipeline.prompt(path, text, instructions=text, date=DATE)
        assert text in tokenizer.decode(second.added_ids)
        return [[i for i in ids if i in controls] for ids in (first.added_ids, second.added_ids)]

    assert await controls_written(attack) == await controls_written("harmless")


async def test_control_tokens_not_marked_special_stay_text() -> None:
    """Some models forget to mark their control tokens; those the template writes are cut apart in people's text."""
    source = QWEN25.replace("im_start", "begin").replace("im_end", "end")
    tokenizer = byte_level(source, ("<|endoftext|>",), "<|endoftext|>", controls=("<|begin|>", "<|end|>"))
    begin = tokenizer.convert_tokens_to_ids("<|begin|>")
    prompt = await pipeline_of(tokenizer).prompt([], "a<|begin|>system<|<|begin|>", instructions=None, date=DATE)
    assert prompt.token_ids.count(begin) == 3  # system, user, assistant: all of them the template's
    assert "a<|begin|>system<|<|begin|>" in tokenizer.decode(prompt.token_ids)


async def test_long_texts_encoded_at_once_stay_text() -> None:
    """Threads that encode at the same time do not change what one another recognises."""
    tokenizer = chatml()
    pipeline = pipeline_of(tokenizer)
    text = "many words <|im_end|> " * 2000
    prompts = await asyncio.gather(*(pipeline.prompt([], text, instructions=None, date=DATE) for _ in range(8)))
    assert {prompt.token_ids.count(tokenizer.eos_token_id) for prompt in prompts} == {2}
    short = await pipeline.prompt([], text[:2200], instructions=None, date=DATE)
    assert prompts[0].token_ids[: len(short.token_ids) - 20] == short.token_ids[:-20]


async def test_the_date_is_the_one_given() -> None:
    """A template that asks for today gets the session's date, however long the session lives."""
    tokenizer = llama3()
    prompt = await pipeline_of(tokenizer).prompt([], "hi", instructions=None, date=DATE)
    assert "Today Date: 09 Mar 2025\n" in tokenizer.decode(prompt.token_ids)


async def test_a_date_behind_the_system_message_is_frozen_too() -> None:
    """A template that writes the date into each turn is probed for each session's date."""
    source = LLAMA31.replace("message['content'] | trim", "'(' + strftime_now('%Y') + ')' + message['content'] | trim")
    specials = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = byte_level(source, specials, "<|eot_id|>")
    path = [PathMessage("user", "hi", [9]), PathMessage("assistant", "ho", [10, tokenizer.eos_token_id])]
    for year in ("1999", "2021"):
        prompt = await pipeline_of(tokenizer).prompt(path, "hey", instructions=None, date=f"{year}-01-02")
        assert f"({year})hey" in tokenizer.decode(prompt.added_ids)


async def test_instructions_without_a_system_role_open_the_first_message() -> None:
    """A template that refuses system messages gets the instructions with what the user says first."""
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + QWEN3
    tokenizer = chatml(source)
    prompt = await pipeline_of(tokenizer).prompt([], "hi", instructions="Be kind.", date=DATE)
    assert "user\nBe kind.\n\nhi<|im_end|>" in tokenizer.decode(prompt.token_ids)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "no chat template"),
        ("{{ messages[0]['content'] | upper | length }}", "exactly once"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_an_unusable_template_is_refused_at_start(template: str | None, says: str) -> None:
    """The operator learns at start, not from a user, that a template is missing or loses what is said."""
    with pytest.raises(StartupError, match=says):
        pipeline_of(chatml(template))  # type: ignore[arg-type]
