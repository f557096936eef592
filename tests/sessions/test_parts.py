"""The small parts by themselves: a growing reply, merged deltas, and the account of what was reused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserve.engine.api import Started
from chatserve.sessions.accounting import Account, cache_object, within_input
from chatserve.sessions.limits import SessionLimits
from chatserve.sessions.reply import Reply
from chatserve.text.pipeline import TextPipeline
from tests.sessions.conftest import EOS, TOKENIZER, Stage
from tests.sessions.fakes import FakeEngine

ORDINARY = st.integers(3, len(TOKENIZER) - 1)
LETTERS = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "abc"]
PIPELINE = TextPipeline(TOKENIZER, [EOS])


def reply_to(batches: list[list[int]], stops: list[str]) -> tuple[Reply, str]:
    reply = Reply(PIPELINE.detokenizer(), stops, [EOS])
    return reply, "".join(reply.push(batch)[0] for batch in batches)


def decoded(token_ids: list[int]) -> str:
    return TOKENIZER.decode(token_ids, skip_special_tokens=True)


@given(
    st.lists(st.lists(ORDINARY | st.just(EOS), max_size=5), max_size=8), st.lists(st.text("ab", min_size=1), max_size=2)
)
def test_a_reply_does_not_depend_on_its_batches(batches: list[list[int]], stops: list[str]) -> None:
    """Text, ids and rest are the same whether ids come one by one or in batches: what a continuation relies on."""
    whole = [token_id for batch in batches for token_id in batch]
    (left, left_text), (right, right_text) = reply_to(batches, stops), reply_to([[i] for i in whole], stops)
    assert (left_text, left.token_ids, left.kept(), left.is_over) == (
        right_text,
        right.token_ids,
        right.kept(),
        right.is_over,
    )


@given(st.lists(ORDINARY, max_size=30), st.booleans())
def test_a_reply_without_stops_is_the_full_decoding(token_ids: list[int], ended: bool) -> None:
    """Up to an unfinished code point, which is kept back unless the reply ended itself."""
    reply, text = reply_to([[*token_ids, EOS] if ended else token_ids], [])
    text += reply.release()
    assert text == reply.text
    if ended:
        assert text == decoded(token_ids)
    else:
        assert decoded(token_ids).startswith(text)
        assert len(decoded(token_ids)) - len(text) <= 1


@given(st.lists(st.sampled_from(LETTERS), max_size=20), st.text("ab", min_size=1, max_size=3))
def test_kept_ids_and_rest_spell_the_kept_text(token_ids: list[int], stop: str) -> None:
    """Cut at a stop string, the ids that stand and the characters left over are the text, and no id more would fit."""
    reply, _ = reply_to([token_ids], [stop])
    reply.release()
    kept, rest = reply.kept()
    text = decoded(token_ids).partition(stop)[0]
    assert decoded(kept) + rest == reply.text == text
    assert rest == ""  # every token here is one character


@given(st.lists(ORDINARY, max_size=20), st.text("aé ", min_size=1, max_size=2))
def test_a_cut_never_splits_a_token(token_ids: list[int], stop: str) -> None:
    """Kept ids end at a whole token and a whole character, whatever the tokens are."""
    reply, _ = reply_to([token_ids], [stop])
    reply.release()
    kept, rest = reply.kept()
    assert kept == token_ids[: len(kept)]
    if reply.is_cut:
        assert decoded(kept) + rest == reply.text
        assert stop not in reply.text


def test_half_a_character_of_a_stop_string_does_not_stand() -> None:
    """A token that holds the first byte of what is cut off is cut off with it."""
    token_ids = TOKENIZER.encode("aé", add_special_tokens=False)
    assert len(token_ids) == 3
    reply, text = reply_to([token_ids], ["é"])
    assert (text, reply.kept()) == ("a", (token_ids[:1], ""))


def test_nothing_is_taken_behind_the_end() -> None:
    """Ids behind an end token are left, and told so."""
    reply = Reply(PIPELINE.detokenizer(), [], [EOS])
    text, taken = reply.push([*LETTERS, EOS, *LETTERS])
    assert (text, taken) == ("abc", [*LETTERS, EOS])
    assert reply.push(LETTERS) == ("", [])


@pytest.mark.parametrize(
    ("cached", "num_history", "planned", "engine", "expected"),
    [
        ({"device": 0}, 0, "first_turn", None, ("miss", None, "first_turn")),
        ({"device": 9}, 0, "first_turn", None, ("partial", "device", "first_turn")),
        ({"device": 99}, 100, None, None, ("hit", "device", None)),
        ({"device": 100}, 100, None, None, ("hit", "device", None)),
        ({"device": 98}, 100, None, None, ("partial", "device", None)),
        ({"device": 0}, 100, None, "not_saved", ("miss", None, "not_saved")),
        ({"device": 50, "host": 49}, 100, None, None, ("hit", "host", None)),
        ({"device": 50, "host": 1, "disk": 2}, 100, None, "expired", ("partial", "disk", "expired")),
        ({"device": 100}, 100, "template_changed", None, ("partial", "device", "template_changed")),
        ({"device": 0}, 1, None, None, ("hit", None, None)),
    ],
)
def test_the_cache_result_follows_from_what_could_be_reused(
    cached: Any, num_history: int, planned: Any, engine: Any, expected: Any
) -> None:
    """Hit: all the history but its last token; less is partial or a miss with the reason."""
    cache = cache_object(cached, num_history=num_history, planned_reason=planned, engine_reason=engine)
    assert (cache["result"], cache["restored_from"], cache["reason"]) == expected


def test_cached_tokens_are_counted_within_the_input() -> None:
    """What a continued response reuses of its own tokens is not input; faster tiers count first."""
    assert within_input({"device": 10, "disk": 5}, 12) == {"device": 10, "host": 0, "disk": 2}


def test_a_restored_account_is_not_told_again() -> None:
    """What was announced before an interruption stands; the continuation's own prefill is no news."""
    first = Account(num_input=20, num_history=10, planned_reason=None)
    assert first.start(Started({"device": 9}, 1.0, 0.0, 2.0))
    again = Account(num_input=20, num_history=10, planned_reason=None)
    assert first.cache is not None
    again.restore(first.usage(0), first.cache)
    assert not again.start(Started({"device": 25}, 5.0, 0.0, 2.0))
    assert (again.usage(3)["input_tokens_details"], again.cache) == ({"cached_tokens": 9}, first.cache)


async def test_the_first_token_is_sent_at_once_and_later_ones_merged(stage: Stage) -> None:
    """The first text does not wait; what comes within the interval becomes one delta."""
    engine = FakeEngine(lambda ids: 70, gated=True)
    chat = await stage.start(engine, limits=SessionLimits(delta_interval_s=0.6))
    session_id = await chat.create()
    await chat.send(session_id, "a", max_output_tokens=12)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    engine.allow(1)
    first = (await chat.events(session_id, until=["response.output_text.delta"]))[-1]
    waited_s = loop.time() - began_s
    for _ in range(5):
        engine.allow(2)
        await asyncio.sleep(0.01)
    second = (await chat.events(session_id, first["seq"], until=["response.output_text.delta"]))[-1]
    assert waited_s < 0.4
    assert second["delta"] == first["delta"] * 10
    assert 0.5 < loop.time() - began_s < 5.0
    engine.allow(100)
    await chat.events(session_id)


async def test_many_tokens_do_not_wait_for_the_interval(stage: Stage) -> None:
    """A fast engine's deltas go as soon as there are enough tokens."""
    engine = FakeEngine(lambda ids: 70, pace_s=0.001)
    chat = await stage.start(engine, limits=SessionLimits(delta_interval_s=60.0, delta_tokens=8))
    session_id = await chat.create()
    await chat.send(session_id, "a", max_output_tokens=40)
    async with asyncio.timeout(5):
        events = await chat.events(session_id)
    deltas = [event for event in events if event["type"].endswith("delta")]
    assert len(deltas) >= 2  # of a minute's interval neither was waited for
