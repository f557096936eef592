"""The engine core over real mapped memory with a model that reads every row: answers, fairness, pressure, ends."""

from __future__ import annotations

import time
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatserve.engine.core import EngineCore
from kvstore import OutOfMappings, tiers
from tests.engine.fakes import RowRunner, expected_reply, make_core, run_until_idle, submit, tokens_of


@pytest.fixture(autouse=True, params=[False, True], ids=["in-step", "overlapped"])
def overlap(request, monkeypatch):
    """Every test runs twice: with a runner that computes at once, and with one that works beside the host."""
    monkeypatch.setattr(RowRunner, "overlaps", request.param)


def test_reply_equals_reference():
    """One request answers with what the rows of its own tokens say."""
    core = make_core()
    submit(core, "r", "s", range(100))
    events = run_until_idle(core)["r"]
    assert [event[0] for event in events] == ["started", *["tokens"] * 8, "finished"]
    assert tokens_of(events) == expected_reply(range(100), 8)


def test_batched_equals_alone():
    """Sixteen requests of all lengths in one batch answer as each would alone."""
    core = make_core()
    prompts = {f"r{i}": list(range(i, i * 23 + 1, 1)) for i in range(1, 17)}
    for request_id, prompt in prompts.items():
        submit(core, request_id, request_id, prompt)
    events = run_until_idle(core)
    for request_id, prompt in prompts.items():
        assert tokens_of(events[request_id]) == expected_reply(prompt, 8)


def test_second_turn_reuses_history():
    """A turn on a resident history computes its new tokens only, and needs only those sent."""
    core = make_core()
    submit(core, "r1", "s", range(200))
    reply = tokens_of(run_until_idle(core)["r1"])
    ids = [*range(200), *reply, 7, 8, 9]
    submit(core, "r2", "s", ids)
    events = run_until_idle(core)["r2"]
    assert events[0][2] == {"device": 207}
    assert tokens_of(events) == expected_reply(ids, 8)


def test_unknown_history_asks_for_tokens():
    """A request whose history the engine does not hold, or holds differently, is answered with need_tokens."""
    core = make_core()
    submit(core, "r", "s", [1, 2], num_history=50, num_history_sent=50, history_hash=b"x" * 16)
    assert core.take_events() == [["need_tokens", "r"]]
    assert core.idle


def test_same_prefix_at_once_is_computed_once():
    """Requests that start together on one prefix let the first compute it and map its pages."""
    core = make_core(max_step_tokens=128)
    prefix = list(range(320))
    for index in range(8):
        submit(core, f"r{index}", f"s{index}", [*prefix, 500 + index])
    events = run_until_idle(core)
    computed = sum(count for step in core._runner.steps for _, count in step)
    assert computed <= 321 + 7 * 33 + 8 * 8
    for index in range(8):
        assert tokens_of(events[f"r{index}"]) == expected_reply([*prefix, 500 + index], 8)


def test_cancelled_leader_hands_over():
    """When the request that computes a shared prefix is cancelled, the first follower takes over."""
    core = make_core()
    for index in range(3):
        submit(core, f"r{index}", f"s{index}", [*range(320), 500 + index])
    core.step()
    core.handle({"verb": "cancel", "request_id": "r0"})
    events = run_until_idle(core)
    assert events["r0"][-1][2] == "cancelled"
    assert tokens_of(events["r2"]) == expected_reply([*range(320), 502], 8)


def test_short_prompt_is_not_stuck_behind_a_long_one():
    """A prefill's share of the step goes to short prompts too: the short one starts within three steps."""
    core = make_core(max_step_tokens=64)
    submit(core, "long", "a", range(900))
    core.step()
    submit(core, "short", "b", range(500, 540))
    for _ in range(3):
        core.step()
    assert ["started", "short"] in [event[:2] for event in core.take_events()]


def test_decoders_go_on_beside_a_prefill():
    """While a long prompt is prefilled in chunks, a decoding request gets a token every step."""
    core = make_core(max_step_tokens=64)
    submit(core, "d", "a", range(5), max_output_tokens=100)
    core.step()
    submit(core, "long", "b", range(900))
    core.take_events()
    for _ in range(5):
        core.step()
        assert sum(event[:2] == ["tokens", "d"] for event in core.take_events()) == 1


def test_cancel_keeps_the_history():
    """A cancel is seen at the next step, and what was computed is reused by the session's next turn."""
    core = make_core()
    submit(core, "r", "s", range(200), max_output_tokens=500)
    for _ in range(10):
        core.step()
    core.handle({"verb": "cancel", "request_id": "r"})
    core.step()
    events = core.take_events()
    assert events[-1][:3] == ["finished", "r", "cancelled"]
    ids = [*range(200), *tokens_of(events)]
    submit(core, "r2", "s", ids)
    assert run_until_idle(core)["r2"][0][2] == {"device": len(ids) - 1}


def test_cancel_during_prefill_keeps_committed_chunks():
    """A request cancelled half way through its prefill leaves its chunks for the next turn."""
    core = make_core()
    submit(core, "r", "s", range(600))
    core.step()
    core.handle({"verb": "cancel", "request_id": "r"})
    core.step()
    submit(core, "r2", "s", range(600))
    assert run_until_idle(core)["r2"][0][2] == {"device": 64}


def test_stop_token_ends_the_reply():
    """A sampled stop token is reported and ends the request with the reason stop."""
    core = make_core()
    reply = expected_reply(range(10), 8)
    submit(core, "r", "s", range(10), stop_token_ids=[reply[3]])
    events = run_until_idle(core)["r"]
    assert tokens_of(events) == reply[: reply.index(reply[3]) + 1]
    assert events[-1][2] == "stop"


def test_full_context_ends_the_reply():
    """A reply that reaches the session's capacity ends with context_window, a longer prompt is refused."""
    core = make_core(max_context=128)
    submit(core, "r", "s", range(120), max_output_tokens=100)
    events = run_until_idle(core)["r"]
    assert len(tokens_of(events)) == 8
    assert events[-1][2] == "context_window"
    submit(core, "r2", "s2", range(128))
    [refused] = core.take_events()
    assert refused[:3] == ["refused", "r2", "context_length_exceeded"]
    assert "128" in refused[3]


def test_full_queue_refuses():
    """Above the bound of waiting requests the next is refused with queue_full, and the others finish."""
    core = make_core(max_waiting=2)
    for index in range(3):
        submit(core, f"r{index}", f"s{index}", range(10))
    [refused] = core.take_events()
    assert refused[:3] == ["refused", "r2", "queue_full"]
    assert set(run_until_idle(core)) == {"r0", "r1"}


def test_continued_request_does_not_repeat_its_end():
    """A request continued after an interruption that came after its last token just finishes."""
    core = make_core()
    reply = expected_reply(range(10), 4)
    submit(core, "r", "s", [*range(10), *reply], num_generated=4, max_output_tokens=4)
    assert [event[0] for event in core.take_events()] == ["started", "finished"]


def test_continued_request_goes_on():
    """A request submitted again with the tokens already reported continues the same reply."""
    core = make_core()
    reply = expected_reply(range(10), 8)
    submit(core, "r", "s", [*range(10), *reply[:3]], num_generated=3)
    assert tokens_of(run_until_idle(core)["r"]) == reply[3:]


def test_tenants_do_not_share():
    """The same prompt of another tenant finds nothing cached."""
    core = make_core()
    submit(core, "r1", "s1", range(200), tenant="a")
    run_until_idle(core)
    submit(core, "r2", "s2", range(200), tenant="b")
    assert run_until_idle(core)["r2"][0][2] == {"device": 0}


def test_too_little_memory_preempts_and_finishes():
    """With room for two and a bit of four growing replies, all four end right: the newest give way and come back."""
    core = make_core(pages=12, max_context=256)
    for index in range(4):
        submit(core, f"r{index}", f"s{index}", range(index * 100, index * 100 + 64), max_output_tokens=120)
    events = run_until_idle(core)
    for index in range(4):
        prompt = range(index * 100, index * 100 + 64)
        assert tokens_of(events[f"r{index}"]) == expected_reply(prompt, 120)


def test_evicted_session_is_recomputed():
    """An idle session whose pages were evicted under pressure answers its next turn as if it had kept them."""
    core = make_core(pages=12, max_context=320)
    submit(core, "r", "s", range(200))
    ids = [*range(200), *tokens_of(run_until_idle(core)["r"]), 1]
    submit(core, "other", "o", range(500, 800))
    run_until_idle(core)
    submit(core, "r2", "s", ids)
    events = run_until_idle(core)["r2"]
    assert events[0][2]["device"] < 207
    assert tokens_of(events) == expected_reply(ids, 8)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_random_load_under_pressure(data):
    """Any mix of turns, branches and cancels in little memory ends, whatever lies below: replies and books right."""
    core = make_core(pages=data.draw(st.integers(6, 20)), max_context=160, max_ranges=data.draw(st.integers(1, 4)),
                     max_step_tokens=data.draw(st.sampled_from([8, 33, 64])),
                     host_pages=data.draw(st.sampled_from([0, 3, 60])))  # fmt: skip
    stems = [list(range(start, start + 70)) for start in (0, 100, 200)]
    histories = {f"s{i}": list(stems[i % 3][: data.draw(st.integers(1, 70))]) for i in range(5)}
    for turn in range(3):
        prompts = {}
        for session_id, history in histories.items():
            del history[data.draw(st.integers(1, len(history))) :]
            history += data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=20))
            prompts[f"{session_id}.{turn}"] = list(history)
            submit(core, f"{session_id}.{turn}", session_id, history, max_output_tokens=20)
        core.step()
        cancelled = data.draw(st.sampled_from([*prompts, None]))
        core.handle({"verb": "cancel", "request_id": cancelled})
        events = run_until_idle(core, max_steps=100_000)
        for _ in range(data.draw(st.integers(0, 3))):
            core.offload()
        for request_id, prompt in prompts.items():
            reply = tokens_of(events.get(request_id, []))
            reference = expected_reply(prompt, 20)
            assert reply == reference[: len(reply)]
            assert len(reply) == 20 or events[request_id][-1][2] in ("cancelled", "context_window")
            histories[request_id.split(".")[0]] += reply[:10]


def test_forgotten_session_leaves_no_range():
    """A forgotten session holds no range and no ids; its prefix stays usable by others of its tenant."""
    core = make_core()
    submit(core, "r", "s", range(200))
    run_until_idle(core)
    core.handle({"verb": "forget", "session_id": "s", "tenant": "t", "histories": []})
    assert core.store.resident_tokens("s") == 0
    submit(core, "r2", "s2", range(200))
    assert run_until_idle(core)["r2"][0][2]["device"] == pytest.approx(199, abs=32)


def test_deleted_history_is_computed_again():
    """What a deleted session had computed alone is gone, also behind its stored ids; what others share is not."""
    core = make_core()
    shared = range(100)
    mine = array("i", [*shared, *range(100, 200)])
    submit(core, "r", "s", mine)
    submit(core, "r2", "s2", [*shared, *range(300, 340)])
    run_until_idle(core)
    core.handle({"verb": "forget", "session_id": "s", "tenant": "t", "histories": [[mine.tobytes(), 100]]})
    core.store.check_integrity()
    submit(core, "r3", "s3", mine)
    assert run_until_idle(core)["r3"][0][2]["device"] <= 100
    submit(core, "r4", "s2", [*shared, *range(300, 340), 1])
    assert run_until_idle(core)["r4"][0][2]["device"] >= 140


def test_prefills_finish_one_after_another():
    """Equal prompts that arrive together are answered in order: the first waits for its own prefill only."""
    core = make_core(max_step_tokens=64)
    for index in range(4):
        submit(core, f"r{index}", f"s{index}", range(100 * index, 100 * index + 64), max_output_tokens=1)
    started = []
    for _ in range(30):
        core.step()
        started.append([event[1] for event in core.take_events() if event[0] == "started"])
    arrivals = [step for step in started if step]
    assert [request for step in arrivals for request in step] == ["r0", "r1", "r2", "r3"]
    assert len(arrivals) == 4


def test_long_prompt_is_sure_of_a_quarter():
    """However many short prompts come, the oldest prefill gets a quarter of every step."""
    core = make_core(max_step_tokens=64, max_context=1024)
    submit(core, "long", "long", range(800), max_output_tokens=1)
    for index in range(200):
        submit(core, f"r{index}", f"s{index}", range(index, index + 60), max_output_tokens=1)
        core.step()
        for event in core.take_events():
            if event[1] == "long" and event[0] == "finished":
                assert index <= 800 // 16
                return
    raise AssertionError("the long prompt starved")


def test_refused_mappings_preempt_and_go_on(monkeypatch):
    """Where the system takes back what it promised, the newest request gives way, and all end with the right tokens."""
    core = make_core()
    settle, refusals = core.store.settle, iter([False, True, False, True, True])

    def sometimes_refuse():
        if next(refusals, False):
            raise OutOfMappings(2, 1)
        settle()

    monkeypatch.setattr(core.store, "settle", sometimes_refuse)
    for index in range(3):
        submit(core, f"r{index}", f"s{index}", range(index, index + 90))
    events = run_until_idle(core)
    for index in range(3):
        assert tokens_of(events[f"r{index}"]) == expected_reply(range(index, index + 90), 8)


def test_lasting_refusal_is_told(monkeypatch):
    """A request that runs alone and still gets no mappings is refused with the remedy, not retried for ever."""
    core = make_core()

    def refuse():
        raise OutOfMappings(2, 1)

    monkeypatch.setattr(core.store, "settle", refuse)
    submit(core, "r", "s", range(10))
    events = run_until_idle(core)["r"]
    assert [event[0] for event in events] == ["refused"]
    assert "--kv-device-memory" in events[0][3]


def returning_core(monkeypatch, **slow) -> tuple[EngineCore, list[int]]:
    """A core whose session `s` was saved and pushed out, and what it says next; copies up are `slow`."""
    core = make_core(pages=24, host_pages=200)
    prompt = list(range(1, 300))
    submit(core, "first", "s", prompt, max_output_tokens=2)
    prompt += [*tokens_of(run_until_idle(core)["first"]), 7, 8, 9]
    assert core.store.flush(time.monotonic() + 10)
    submit(core, "other", "o", [5, *range(600)], max_output_tokens=2)
    run_until_idle(core)
    for name, value in slow.items():
        monkeypatch.setattr(core.store.tiers.transfers, name, value)
    return core, prompt


class NeverTransfer:
    """A copy that does not come to an end."""

    seconds = 0.0

    def done(self):
        return False

    def failed(self):
        return False


def test_a_returning_history_is_restored_before_its_turn(monkeypatch):
    """The turn finds its rows, says whence they came, and answers as if they had never gone."""
    core, prompt = returning_core(monkeypatch)
    submit(core, "again", "s", prompt, max_output_tokens=4)
    events = run_until_idle(core)["again"]
    assert tokens_of(events) == expected_reply(prompt, 4)
    assert events[0][2]["host"] > 100
    core.close(1)


@pytest.mark.parametrize(
    ("missing", "known", "reason"),
    [("below", True, None), ("expired", True, "expired"), ("gone", True, "evicted"), ("gone", False, "not_saved")],
)
def test_the_reason_of_a_miss(monkeypatch, missing, known, reason):
    """Nothing is lost where computing was sooner; else it is told what became of the history."""
    core, prompt = returning_core(monkeypatch, up=lambda *_: NeverTransfer())
    core.store.note_computed(1000, 1e-6)
    core.store.tiers.promotions.host_cost.observe(1, 10.0)
    if missing != "below":
        monkeypatch.setattr(core.store, "missing", lambda *_: missing)
    if not known:
        core._history.forget("s")
    submit(core, "again", "s", prompt, num_computed=len(prompt) - 3)
    events = run_until_idle(core)["again"]
    assert tokens_of(events) == expected_reply(prompt, 8)
    assert set(events[0][2]) == {"device"}  # nothing was brought back
    assert events[0][-1] == reason
    core.close(1)


def test_a_copy_that_never_ends_is_not_waited_for(monkeypatch):
    """The turn is computed after all, the answer is the same, and the pages that are held do not stop others."""
    monkeypatch.setattr(tiers, "PATIENCE_S", 0.05)
    core, prompt = returning_core(monkeypatch, up=lambda *_: NeverTransfer())
    core.store.note_computed(1000, 0.01)
    submit(core, "again", "s", prompt, max_output_tokens=4)
    deadline = time.monotonic() + 20
    events = []
    while not core.idle:
        assert time.monotonic() < deadline
        core.step()
        events += core.take_events()
    assert tokens_of(events) == expected_reply(prompt, 4)


def test_the_store_knows_whether_a_first_token_is_awaited(monkeypatch):
    """From when a turn has come until its first token, and no longer: the tiers give way meanwhile."""
    core, awaited = make_core(), []
    tend = core.store.tend
    monkeypatch.setattr(
        core.store, "tend", lambda *, is_awaited=False, **told: awaited.append(is_awaited) or tend(**told)
    )
    submit(core, "r", "s", list(range(150)), max_output_tokens=4)  # three steps of 64 to the first token
    run_until_idle(core)
    num_awaited = awaited.index(False)
    assert 3 <= num_awaited <= 4  # the last of the three may be known a step later
    assert not any(awaited[num_awaited:])
