"""Reuse never changes the answer: greedy, token for token, fp32, on the bundled model and real mapped memory.

Every test compares with an engine that computes each prompt from nothing, alone.
"""

from __future__ import annotations

import random

import pytest

from chatserve.engine.build import build
from chatserve.engine.config import EngineConfig
from chatserve.engine.core import EngineCore
from chatserve.pretrained import load_pretrained
from tests.engine.fakes import run_until_idle, submit, tokens_of

REPLY_TOKENS = 24
FACTS = [
    "Hello! My name is Zorvin.",
    "My sister is called Melka, and my dog is called Bruno.",
    "My favourite colour is teal. Please remember the number 4711.",
    "I live in Quorra. The keys are in the drawer.",
    "Actually, my dog is called Fenn.",
]
QUESTIONS = ["What is my name?", "What is my dog called?", "Where do I live?", "What is my favourite colour?"]


def make_engine(**fields) -> EngineCore:
    """An engine core on the bundled model in this process."""
    core, _ = build(
        EngineConfig(model="bundled", device="cpu", **({"kv_device_bytes": 64 << 20, "num_threads": 1} | fields))
    )
    return core


@pytest.fixture(scope="module")
def tokenizer():
    """The bundled model's."""
    return load_pretrained("bundled").tokenizer


@pytest.fixture(scope="module")
def plain():
    """The reference: nothing is reused, every request runs alone."""
    core = make_engine()

    def reply(token_ids):
        submit(core, "ref", "ref", token_ids, reuse=False, max_output_tokens=REPLY_TOKENS)
        return tokens_of(run_until_idle(core, check=False)["ref"])

    return reply


def answer(core, session_id, token_ids):
    """The events of one request run alone on `core`."""
    submit(core, "r", session_id, token_ids, max_output_tokens=REPLY_TOKENS)
    return run_until_idle(core)["r"]


def user_turn(tokenizer, text, *, first=False):
    """The ids one user message adds to its session."""
    start = "" if first else "<|im_end|>\n"
    piece = f"{start}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer.encode(piece, add_special_tokens=False)


def converse(core, plain, tokenizer, lines, session_id="s"):
    """Hold a conversation, comparing each reply with the reference; returns all its ids and the cached counts."""
    ids, cached = [], []
    for index, line in enumerate(lines):
        ids += user_turn(tokenizer, line, first=index == 0)
        events = answer(core, session_id, ids)
        reply = tokens_of(events)
        assert reply == plain(ids), f"turn {index} of {session_id} differs"
        cached.append(events[0][2]["device"])
        ids += reply
    return ids, cached


def test_reuse_on_equals_off(plain, tokenizer):
    """A conversation whose every turn reuses its history answers as one that recomputes it."""
    core = make_engine()
    ids, cached = converse(core, plain, tokenizer, FACTS + QUESTIONS)
    assert cached[0] == 0
    assert all(count > 0 for count in cached[1:])
    assert cached[-1] > len(ids) - 100


def test_batched_equals_alone(plain, tokenizer):
    """Twelve different conversations in one batch answer as each alone."""
    core = make_engine(max_step_tokens=97)
    generator = random.Random(5)
    prompts = {}
    for index in range(12):
        lines = [*generator.sample(FACTS, 3), generator.choice(QUESTIONS)]
        prompts[f"r{index}"] = [token for line in lines for token in user_turn(tokenizer, line)]
        submit(core, f"r{index}", f"s{index}", prompts[f"r{index}"], max_output_tokens=REPLY_TOKENS)
    events = run_until_idle(core)
    for request_id, prompt in prompts.items():
        assert tokens_of(events[request_id]) == plain(prompt), request_id


def test_forked_equals_fresh(plain, tokenizer):
    """Sessions that branch from one beginning at arbitrary tokens share its pages and answer as fresh ones."""
    core = make_engine()
    ids, _ = converse(core, plain, tokenizer, FACTS)
    for cut in (1, 15, 16, 17, len(ids) // 2, len(ids) - 1, len(ids)):
        branch = ids[:cut] + user_turn(tokenizer, QUESTIONS[cut % 4])
        events = answer(core, f"fork{cut}", branch)
        assert events[0][2]["device"] >= cut - 1, "a fork is exact to the token"
        assert tokens_of(events) == plain(branch)


def test_edited_history_equals_fresh(plain, tokenizer):
    """A session that goes back and takes another branch, and back again, answers as if it had never left."""
    core = make_engine()
    ids, _ = converse(core, plain, tokenizer, FACTS)
    for cut in (len(ids) - 40, 33, len(ids) // 2):
        branch = ids[:cut] + user_turn(tokenizer, QUESTIONS[0])
        assert tokens_of(answer(core, "s", branch)) == plain(branch)
    again = ids + user_turn(tokenizer, QUESTIONS[1])
    events = answer(core, "s", again)
    assert events[0][2]["device"] >= len(ids) - 1
    assert tokens_of(events) == plain(again)


def test_evicted_and_recomputed_equals_kept(plain, tokenizer):
    """With memory for little more than one conversation, two that take turns evict each other and answer the same."""
    core = make_engine(kv_device_bytes=4 << 20, max_context=640)
    conversations = {name: [] for name in ("a", "b")}
    for index, line in enumerate(FACTS + QUESTIONS):
        for name, ids in conversations.items():
            ids += user_turn(tokenizer, f"{line} {name}", first=index == 0)
            events = answer(core, name, ids)
            assert tokens_of(events) == plain(ids)
            ids += tokens_of(events)
    assert core.store.stats().evicted_tokens > 400, "the budget was meant to force evictions"


def test_tenants_never_share(plain, tokenizer):
    """The same conversation of another tenant maps no page of the first and answers the same."""
    core = make_engine()
    ids, _ = converse(core, plain, tokenizer, FACTS[:3])
    submit(core, "r", "theirs", ids, tenant="another", max_output_tokens=REPLY_TOKENS)
    events = run_until_idle(core)["r"]
    assert events[0][2] == {"device": 0}
    assert tokens_of(events) == plain(ids)


def test_interrupted_prefill_equals_whole(plain, tokenizer):
    """Chunks of odd sizes, a cancel in the middle and a continuation give the reply of one whole prefill."""
    core = make_engine(max_step_tokens=13)
    ids = [token for line in FACTS + QUESTIONS[:1] for token in user_turn(tokenizer, line)]
    submit(core, "gone", "s", ids)
    for _ in range(4):
        core.step()
    core.handle({"verb": "cancel", "request_id": "gone"})
    core.step()
    core.take_events()
    events = answer(core, "s", ids)
    assert events[0][2]["device"] == 4 * 13
    assert tokens_of(events) == plain(ids)
