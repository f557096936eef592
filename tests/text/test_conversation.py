"""Conversations that come as text: behind ids that are known, and whole."""

from __future__ import annotations

import pytest

from chatserve.text.pipeline import PathMessage, TextPipeline
from tests.text.tokenizers import FAMILIES, LLAMA2, sentencepiece

DATE = "2026-07-31"
TEXTS = ("Hello", "Hi there.", "My dog is 5.", "Fine", "Bye")


def dialogue(*texts: str) -> list[PathMessage]:
    return [PathMessage(("user", "assistant")[index % 2], text, ()) for index, text in enumerate(texts)]


def pipeline(family: str) -> TextPipeline:
    tokenizer = FAMILIES[family]()
    return TextPipeline(tokenizer, [tokenizer.eos_token_id])


async def whole(text: TextPipeline, path: list[PathMessage], instructions: str | None) -> list[int]:
    return (await text.prompt(path, None, instructions=instructions, date=DATE)).token_ids


@pytest.mark.parametrize("instructions", [None, "Be kind."])
@pytest.mark.parametrize("family", list(FAMILIES))
async def test_extended_is_the_whole_rendered(family, instructions):
    """What is put behind nothing is what the template makes of all of it, in every family."""
    text = pipeline(family)
    path = await text.extended((), dialogue(*TEXTS), instructions=instructions, date=DATE)
    rendered = await text.conversation(dialogue(*TEXTS), instructions=instructions, date=DATE)
    assert await whole(text, path, instructions) == rendered


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("num_known", [2, 4])
async def test_extended_keeps_known_ids(family, num_known):
    """Behind messages whose ids are known only what is new gets ids."""
    text = pipeline(family)
    known = await text.extended((), dialogue(*TEXTS)[:num_known], instructions=None, date=DATE)
    longer = await text.extended(known, dialogue(*TEXTS)[num_known:], instructions=None, date=DATE)
    assert longer[:num_known] == known
    assert await whole(text, longer, None) == await text.conversation(dialogue(*TEXTS), instructions=None, date=DATE)


@pytest.mark.parametrize("texts", [["word " * 5000], ["word"] * 101])
async def test_long_conversations_are_the_same(texts):
    """What is encoded in a thread gives the same ids."""
    text = pipeline("qwen2.5")
    said = dialogue(*texts)
    path = await text.extended((), said, instructions=None, date=DATE)
    assert await whole(text, path, None) == await text.conversation(said, instructions=None, date=DATE)


@pytest.mark.parametrize("roles", [["user", "user"], ["user", "system", "user"]])
async def test_roles_the_template_refuses(roles):
    """A template that raises or leaves a message out gives no prompt."""
    tokenizer = sentencepiece(LLAMA2, legacy=False)
    said = [PathMessage(role, "x", ()) for role in roles]
    text = TextPipeline(tokenizer, [tokenizer.eos_token_id])
    assert await text.conversation(said, instructions=None, date=DATE) is None
