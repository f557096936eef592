"""Prompts of unusual turns: continued replies, raw ids, cut replies, foreign ids, templates that rewrite history."""

from __future__ import annotations

from typing import Any

import pytest

from chatserve.text.pipeline import LONG_TEXT_CHARS, PathMessage, Prompt, TextPipeline
from tests.text.tokenizers import LLAMA2, chatml, sentencepiece

DATE = "2025-03-09"
NO_HISTORY = "{% for m in messages[-1:] %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
FORGETS_FIRST = (
    "{% for m in messages %}{% if loop.last or not loop.first %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}<|im_start|>"
)


def pipeline_of(tokenizer: Any) -> TextPipeline:
    return TextPipeline(tokenizer, [tokenizer.eos_token_id])


async def prompt_of(
    tokenizer: Any, path: list[PathMessage], said: str | list[int] | None, instructions: str | None = None
) -> Prompt:
    return await pipeline_of(tokenizer).prompt(path, said, instructions=instructions, date=DATE)


async def begun(tokenizer: Any, reply: str, *, ended: bool = True) -> list[PathMessage]:
    """One turn: "hi" and this reply."""
    first = await prompt_of(tokenizer, [], "hi")
    ids = tokenizer.encode(reply, add_special_tokens=False)
    ids += [tokenizer.eos_token_id] if ended else []
    return [PathMessage("user", "hi", first.added_ids), PathMessage("assistant", reply, ids)]


async def test_regenerate_and_continue_add_nothing() -> None:
    """Without input the prompt is the path as it stands, all of it history."""
    path = await begun(chatml(), "Hello", ended=False)
    for part in (path[:1], path):
        prompt = await prompt_of(chatml(), part, None)
        ids = [token_id for message in part for token_id in message.token_ids]
        assert prompt == Prompt(ids, len(ids), [])


async def test_token_ids_are_appended_raw() -> None:
    """Ids sent by the client go in as they are, first or later, with nothing of the template around them."""
    path = await begun(chatml(), "Hello")
    first = await prompt_of(chatml(), [], [7, 8, 9])
    later = await prompt_of(chatml(), path, [7, 8, 9])
    assert first.token_ids == [7, 8, 9]
    assert later.token_ids[later.num_history :] == later.added_ids == [7, 8, 9]


async def test_an_unfinished_reply_is_ended_by_the_template() -> None:
    """Behind a reply without its end token the template's end of a reply comes first, behind a finished one not."""
    eos = chatml().eos_token_id
    cut = await prompt_of(chatml(), await begun(chatml(), "Hello", ended=False), "more")
    ended = await prompt_of(chatml(), await begun(chatml(), "Hello"), "more")
    assert cut.added_ids == [eos, *ended.added_ids]


@pytest.mark.parametrize("tokenizer", [chatml(), sentencepiece(LLAMA2, legacy=False)])
async def test_characters_without_tokens_are_encoded_with_the_next_turn(tokenizer: Any) -> None:
    """What a stop string left of a reply beyond its last whole token stands behind its ids in the next prompt."""
    path = await begun(tokenizer, "Hello my", ended=False)
    path[1] = PathMessage("assistant", "Hello my na", path[1].token_ids, pending_text=" na")
    prompt = await prompt_of(tokenizer, path, "more")
    written = tokenizer.decode(prompt.token_ids)
    assert written.count("Hello my na") == 1
    assert tokenizer.decode(prompt.added_ids).lstrip().startswith("na")


async def test_a_template_that_forgets_is_rendered_anew() -> None:
    """A template that rewrites earlier messages is followed; the prefix in common counts as history."""
    tokenizer = chatml(FORGETS_FIRST)
    path = await begun(tokenizer, "Hello")
    prompt = await prompt_of(tokenizer, path, "more")
    assert tokenizer.decode(prompt.token_ids) == "<|im_start|>Hello<|im_end|><|im_start|>more<|im_end|><|im_start|>"
    assert (prompt.added_ids, prompt.reason) == ([], "template_changed")
    assert prompt.num_history == 1  # <|im_start|>; "hi" stood behind it before


async def test_a_template_without_history_says_the_last_message_only() -> None:
    """What the template leaves out is left out."""
    tokenizer = chatml(NO_HISTORY)
    prompt = await prompt_of(tokenizer, await begun(tokenizer, "Hello"), "more")
    assert tokenizer.decode(prompt.token_ids) == "<|im_start|>more<|im_end|>"


async def test_rendered_anew_a_reply_keeps_its_own_ids() -> None:
    """A reply is not tokenised again, even where the whole conversation is rendered."""
    tokenizer = chatml(FORGETS_FIRST)
    odd = [tokenizer.convert_tokens_to_ids(char) for char in "Hello"]  # not how an encoder would write it
    path = [*(await begun(tokenizer, "x"))[:1], PathMessage("assistant", "Hello", [*odd, tokenizer.eos_token_id])]
    prompt = await prompt_of(tokenizer, path, "more")
    assert prompt.token_ids[1:6] == odd


async def test_a_continued_reply_is_one_message_when_rendered_anew() -> None:
    """A reply in two parts stands in one place of the template, and as a prompt it stays open."""
    tokenizer = chatml(FORGETS_FIRST)
    path = [*await begun(tokenizer, "Hel", ended=False)]
    path.append(PathMessage("assistant", "lo", tokenizer.encode("lo", add_special_tokens=False)))
    closed = await prompt_of(tokenizer, path, "more")
    opened = await prompt_of(tokenizer, path, None)
    assert tokenizer.decode(closed.token_ids).startswith("<|im_start|>Hello<|im_end|><|im_start|>more")
    assert tokenizer.decode(opened.token_ids) == "<|im_start|>hi<|im_end|><|im_start|>Hello"


async def test_ids_of_another_model_are_rendered_from_their_text() -> None:
    """After a change of model the session goes on from its texts, and says why nothing was reused."""
    tokenizer = chatml()
    own = await begun(tokenizer, "Hello")
    path = [PathMessage("user", "hi", [1]), PathMessage("assistant", "Hello", [2, 3], foreign=True)]
    prompt = await prompt_of(tokenizer, path, "more")
    assert prompt.token_ids == (await prompt_of(tokenizer, own, "more")).token_ids
    assert (prompt.num_history, prompt.reason) == (0, "model_changed")


async def test_a_turn_behind_a_changed_model_reuses_what_this_model_said() -> None:
    """The second turn after a change of model has its history again."""
    tokenizer = chatml()
    old = [PathMessage("user", "hi", [1]), PathMessage("assistant", "Hello", [2, 3], foreign=True)]
    first = await prompt_of(tokenizer, old, "more")
    reply = [*tokenizer.encode("No", add_special_tokens=False), tokenizer.eos_token_id]
    path = [*old, PathMessage("user", "more", ()), PathMessage("assistant", "No", reply)]
    second = await prompt_of(tokenizer, path, "why")
    assert second.reason is None
    assert second.token_ids[: second.num_history] == [*first.token_ids, *reply][: second.num_history]
    assert second.num_history >= len(first.token_ids) + len(reply) - 1


async def test_a_long_text_gives_the_ids_of_its_pieces() -> None:
    """A text encoded in a thread is encoded like any other."""
    tokenizer = chatml()
    text = "word " * (LONG_TEXT_CHARS // 4)
    prompt = await prompt_of(tokenizer, [], text)
    assert text in tokenizer.decode(prompt.token_ids)


def test_decode_leaves_special_tokens_out() -> None:
    """Ids sent raw are shown as text without control tokens."""
    tokenizer = chatml()
    ids = tokenizer.encode("<|im_start|>Hello<|im_end|>", add_special_tokens=False)
    assert pipeline_of(tokenizer).decode(ids) == "Hello"
