"""Histories that left the GPU come back from pinned memory and from disk, and the answers are those of before."""

from __future__ import annotations

import random
import time

import pytest

from tests.engine.fakes import run_until_idle, submit, tokens_of
from tests.gpu.probe import COMMON, SHAPES, ProbedEngine, assert_same_answer, reference_logits
from tests.model.checkpoints import make_checkpoint

pytest.importorskip("chatserve.engine.cuda_backend")

MIB = 1 << 20


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random bf16 checkpoint."""
    return make_checkpoint(tmp_path_factory.mktemp("tiers"), "llama", **COMMON, **SHAPES["llama"])


def random_ids(num_tokens, seed):
    """Token ids that no special token is among."""
    return random.Random(seed).choices(range(10, 380), k=num_tokens)


def tiered(directory, disk=None):
    """An engine with 40 MiB on the device, which is 10,000 tokens, and much more below."""
    below = {"kv_host_bytes": 512 * MIB}
    if disk is not None:
        below |= {"kv_disk_bytes": 512 * MIB, "kv_disk_path": str(disk)}
    return ProbedEngine(directory, kv_device_bytes=40 * MIB, max_context=4096, **below)


def returning_turn(engine, directory, request_id, prompt):
    """The turn's event that says what was reused; its logits are those of transformers."""
    submit(engine.core, request_id, "mine", prompt, max_output_tokens=16)
    events = run_until_idle(engine.core, max_steps=100_000)[request_id]
    ids = [*prompt, *tokens_of(events)]
    expected = reference_logits(directory, ids)
    for position, logits in engine.logits[request_id].items():
        assert_same_answer(logits, expected[position - 1])
    return next(event for event in events if event[0] == "started")


def push_out(engine):
    """Other sessions take the device."""
    for number in range(5):
        engine.reply(f"other{number}", f"o{number}", random_ids(3000, 100 + number), 2)


def test_a_history_comes_back_from_pinned_memory(directory):
    """After others took the device, most of it is copied up; the answer is computed on the same rows."""
    engine = tiered(directory)
    prompt = random_ids(3000, 1)
    prompt += engine.reply("first", "mine", prompt, 20)
    assert engine.core.store.flush(time.monotonic() + 20)
    push_out(engine)
    started = returning_turn(engine, directory, "again", [*prompt, *random_ids(30, 2)])
    assert started[2]["host"] > 2000
    engine.core.store.check_integrity()
    engine.close()


def test_a_history_comes_back_from_disk_after_a_restart(directory, tmp_path):
    """Another engine on the same directory reads it from disk; the answer is computed on the same rows."""
    first = tiered(directory, tmp_path / "kv")
    prompt = random_ids(3000, 3)
    prompt += first.reply("first", "mine", prompt, 20)
    first.core.close(20)
    second = tiered(directory, tmp_path / "kv")
    started = returning_turn(second, directory, "again", [*prompt, *random_ids(30, 4)])
    assert started[2]["disk"] > 2900
    second.core.close(20)


def test_sessions_that_come_and_go_under_pressure_answer_the_same(directory):
    """Turns of eight sessions, twice what the device holds, offloading and promotion beside them all the time."""
    engine = tiered(directory)
    histories = {f"s{number}": random_ids(2000, 50 + number) for number in range(8)}
    for turn in range(3):
        for session_id, ids in histories.items():
            submit(engine.core, f"{session_id} {turn}", session_id, ids, max_output_tokens=8)
        events = run_until_idle(engine.core, check=turn == 2, max_steps=200_000)
        for session_id, ids in histories.items():
            ids += [*tokens_of(events[f"{session_id} {turn}"]), *random_ids(20, turn)]
    for session_id, ids in histories.items():
        expected = reference_logits(directory, ids)
        for position, logits in engine.logits[f"{session_id} 2"].items():
            assert_same_answer(logits, expected[position - 1])
    assert engine.core.store.stats().promoted_host_pages > 0  # as many as come sooner than computed
    engine.close()
