"""The engine's logits on a GPU against transformers', wherever histories lie and whatever lies beside them."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tests.engine.fakes import run_until_idle, submit, tokens_of
from tests.gpu.probe import COMMON, SHAPES, ProbedEngine, assert_same_answer, reference_logits
from tests.kvstore.fakes import DRIVER_CALLS, fail_call
from tests.model.checkpoints import make_checkpoint

cuda_backend = pytest.importorskip("chatserve.engine.cuda_backend")
flash = pytest.importorskip("chatserve.model.flash")
cuda_operations = pytest.importorskip("chatserve.model.cuda_operations")


@pytest.fixture(scope="module", params=sorted(SHAPES))
def directory(request, tmp_path_factory):
    """A random bf16 checkpoint of each family."""
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, **COMMON, **SHAPES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The checkpoint of one family."""
    return make_checkpoint(tmp_path_factory.mktemp("one"), "llama", **COMMON, **SHAPES["llama"])


@pytest.fixture
def engine(directory):
    """A fresh engine on it."""
    probed = ProbedEngine(directory)
    yield probed
    probed.close()


def random_ids(num_tokens, seed):
    """Token ids that no special token is among."""
    return random.Random(seed).choices(range(10, 380), k=num_tokens)


def check(engine, directory, request_id, prompt, reply):
    """Every token of the reply was chosen from logits like transformers'."""
    ids = [*prompt, *reply]
    expected = reference_logits(directory, ids)
    for position, logits in engine.logits[request_id].items():
        assert_same_answer(logits, expected[position - 1])
    assert set(engine.logits[request_id]) >= set(range(len(prompt), len(ids)))


def test_prefill_and_decode_answer_like_transformers(engine, directory):
    """Prompts of one token, one tile and several chunks, then decodes; the attention in use is FlashInfer's."""
    assert engine.info.attention.startswith("FlashInfer")
    for index, length in enumerate([1, 17, 128, 700, 2000]):
        prompt = random_ids(length, index)
        check(engine, directory, f"r{index}", prompt, engine.reply(f"r{index}", f"s{index}", prompt, 20))


def test_batch_of_mixed_work_answers_like_transformers(engine, directory):
    """Prefills and decodes of twelve sessions in the same steps."""
    prompts = {f"r{i}": random_ids(1 + 97 * i, i) for i in range(12)}
    for request_id, prompt in prompts.items():
        submit(engine.core, request_id, request_id, prompt, max_output_tokens=24)
        engine.core.step()
    events = run_until_idle(engine.core, check=False)
    for request_id, prompt in prompts.items():
        check(engine, directory, request_id, prompt, tokens_of(events[request_id]))


def test_turns_on_a_resident_history_answer_like_transformers(engine, directory):
    """Few new tokens on a long history, which the other prefill kernel attends; reuse on and off agree."""
    history = random_ids(3000, 1)
    history += engine.reply("first", "s", history, 8)
    for turn, length in enumerate([1, 5, 32, 200, 900]):
        history += random_ids(length, 100 + turn)
        reply = engine.reply(f"t{turn}", "s", history, 6)
        check(engine, directory, f"t{turn}", history, reply)
        engine.reply(f"fresh{turn}", f"fresh{turn}", history, 1, reuse=False)
        assert_same_answer(engine.logits[f"fresh{turn}"][len(history)], engine.logits[f"t{turn}"][len(history)])
        history += reply


def test_shared_prefix_answers_like_transformers(engine, directory):
    """Sessions that map one prefix's pages, parting on and off page boundaries."""
    prefix = random_ids(1500, 2)
    engine.reply("owner", "owner", prefix, 4)
    for index, shared in enumerate([1024, 1025, 1500]):
        prompt = prefix[:shared] + random_ids(40, index)
        check(engine, directory, f"b{index}", prompt, engine.reply(f"b{index}", f"b{index}", prompt, 8))


def test_nan_beside_a_history_changes_nothing(engine, directory):
    """Rows behind the ends of neighbours, and pages that others have left, may hold anything.

    The FA3 kernel multiplies masked rows by zero, so that one NaN in a mapped tile would spread to every output.
    """
    store = engine.core.store
    tokens_a_page = store.layout.complete_tokens(1)
    for index, length in enumerate([127, 128, 129, tokens_a_page - 1, tokens_a_page, tokens_a_page + 1, 1000]):
        neighbour = store.lease(f"n{index}", b"other", random_ids(300, 50 + index))
        neighbour.grow(300)
        store.settle()
        rows = store.arena[neighbour.base_token : neighbour.base_token + neighbour.capacity_tokens]
        rows.fill_(float("nan"))
        torch.cuda.synchronize()
        prompt = random_ids(length, 60 + index)
        check(engine, directory, f"r{index}", prompt, engine.reply(f"r{index}", f"s{index}", prompt, 20))
        neighbour.release()
        store.drop_session(f"n{index}")  # its poisoned pages are the next ones to be handed out


def test_far_ends_of_the_arena_answer_like_transformers(directory):
    """Sessions whose rows lie past token 65,536 and past element 2**31."""
    engine = ProbedEngine(directory, max_context=8192)
    store = engine.core.store
    token_elements = store.layout.token_bytes // 2
    num_ranges = 2**31 // token_elements // 8192 + 4
    leases = [store.lease(f"filler{i}", b"", [1]) for i in range(min(num_ranges, 1000))]
    prompt = random_ids(900, 3)
    check(engine, directory, "r", prompt, engine.reply("r", "far", prompt, 8))
    far = store.lease("far", b"t", prompt)
    assert far.base_token > 65_536
    assert far.base_token * token_elements > 2**31
    for lease in [far, *leases]:
        lease.release()
    engine.close()


@pytest.mark.parametrize("missing", ["fa3", "flashinfer"])
def test_without_the_fastest_kernels_answers_are_the_same(directory, monkeypatch, missing):
    """Older GPUs prefill with the paged kernel and multiply with cuBLAS; without flashinfer torch attends."""
    if missing == "fa3":
        monkeypatch.setattr(flash, "HOPPER", 99)
        monkeypatch.setattr(cuda_operations, "SMALL_LINEAR_CAPABILITY", 99)
    else:
        monkeypatch.setattr(cuda_backend, "find_spec", lambda _: None)
    engine = ProbedEngine(directory)
    assert ("FA2 paged prefill" if missing == "fa3" else "flashinfer is not installed") in engine.info.attention
    for index, length in enumerate([1, 300, 2000]):
        prompt = random_ids(length, index)
        check(engine, directory, f"r{index}", prompt, engine.reply(f"r{index}", f"s{index}", prompt, 8))
    engine.close()


@pytest.mark.parametrize("call", [call for call in DRIVER_CALLS if call != "wait_event"])  # which service seldom makes
def test_one_refused_driver_call_is_not_felt(llama, call):
    """Whichever call is refused once amid service, it is rolled back and done again: every answer is the right one."""
    engine = ProbedEngine(llama, kv_device_bytes=256 << 20)
    prefix = random_ids(500, 1)
    engine.reply("owner", "owner", prefix, 4)
    countdown = fail_call(engine.core.store._memory._driver, call)
    prompts = {f"r{i}": prefix[: 90 * (i % 5)] + random_ids(700, 10 + i) for i in range(16)}
    for request_id, prompt in prompts.items():
        submit(engine.core, request_id, request_id, prompt, max_output_tokens=40)
    events = run_until_idle(engine.core)
    for request_id in prompts:
        engine.core.handle({"verb": "forget", "session_id": request_id, "tenant": "t", "histories": []})
    engine.core.store._residency.evict(1000)
    engine.core.rest()
    engine.core.rest()
    engine.core.store.check_integrity()
    assert countdown.remaining <= 0, "the call was never made"
    for request_id in ("r0", "r1", "r4", "r15"):
        check(engine, llama, request_id, prompts[request_id], tokens_of(events[request_id]))
    engine.close()


def test_sampled_tokens_depend_on_seed_and_position_only(engine):
    """The same request computed anew draws the same tokens in another session; another seed draws others."""
    prompt = random_ids(64, 4)
    sampling = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 7}
    alone = engine.reply("alone", "s1", prompt, 16, sampling=sampling, reuse=False)
    assert engine.reply("again", "s2", prompt, 16, sampling=sampling, reuse=False) == alone
    assert engine.reply("other", "s3", prompt, 16, sampling=sampling | {"seed": 8}, reuse=False) != alone
    assert len(set(alone)) > 1


def test_little_memory_preempts_and_finishes(directory):
    """More sessions than the memory holds: all end with all their tokens, and the books are right."""
    engine = ProbedEngine(directory, kv_device_bytes=48 << 20)
    lengths = itertools.cycle([300, 700, 1500])
    for index in range(24):
        submit(engine.core, f"r{index}", f"s{index}", random_ids(next(lengths), index), max_output_tokens=64)
    events = run_until_idle(engine.core, check=False)
    assert all(len(tokens_of(events[f"r{index}"])) == 64 for index in range(24))
    assert engine.core.store.stats().evicted_pages > 0
    engine.core.store.check_integrity()
    engine.close()
