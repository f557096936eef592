"""Whose turn is next among those who wait: the queue alone, against a plain model, and through the engine."""

from __future__ import annotations

import random
from collections import deque

import pytest

from chatserve.engine.waiting import WaitingQueue
from tests.engine.fakes import RowRunner, make_core, run_until_idle, submit


class Waiting:
    """A request as far as the queue looks at it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.salt = name[0].encode()


def queue_of(names: str) -> WaitingQueue:
    queue = WaitingQueue()
    for name in names.split():
        queue.append(Waiting(name))
    return queue


def names_of(queue: WaitingQueue) -> str:
    return " ".join(request.name for request in queue)


def drained(queue: WaitingQueue) -> str:
    return " ".join(queue.popleft().name for _ in range(len(queue)))


@pytest.mark.parametrize(
    ("sent", "order"),
    [
        ("a1 a2 a3", "a1 a2 a3"),
        ("a1 a2 a3 b1", "a1 b1 a2 a3"),
        ("a1 a2 b1 c1 b2 a3", "a1 b1 c1 a2 b2 a3"),
        ("", ""),
    ],
)
def test_tenants_take_turns(sent, order):
    """Tenants follow one another, each with its oldest request; going through shows that order."""
    assert names_of(queue_of(sent)) == order
    assert drained(queue_of(sent)) == order


def test_who_was_served_waits_a_round():
    """A tenant that comes back right after its turn stands behind the others."""
    queue = queue_of("a1 a2 b1")
    assert queue.popleft().name == "a1"
    queue.append(Waiting("a3"))
    assert drained(queue) == "b1 a2 a3"


def test_putting_back_restores_the_order():
    """Whatever was taken and put back in reverse stands where it stood."""
    queue = queue_of("a1 a2 b1 c1 c2")
    taken = [queue.popleft() for _ in range(4)]
    queue.extendleft(reversed(taken))
    assert [queue.popleft().name for _ in range(3)] == ["a1", "b1", "c1"]


def test_one_tenant_is_a_plain_queue():
    """With one tenant every operation gives what a deque gives, in any order of 2,000 of them."""
    rng = random.Random(7)
    queue, plain = WaitingQueue(), deque()
    for number in range(2000):
        action = rng.choice(["append", "appendleft", "popleft", "remove"])
        if action in ("append", "appendleft"):
            request = Waiting(f"a{number}")
            getattr(queue, action)(request), getattr(plain, action)(request)
        elif plain:
            chosen = plain[0] if action == "popleft" else rng.choice(plain)
            plain.remove(chosen)
            assert action == "remove" or queue.popleft() is chosen
            if action == "remove":
                queue.remove(chosen)
        assert (list(queue), len(queue)) == (list(plain), len(plain))


def test_length_and_order_agree_for_many_tenants():
    """However tenants mix, going through, counting and taking agree, and an unknown request is refused."""
    rng = random.Random(11)
    queue, inside = WaitingQueue(), set()
    for number in range(2000):
        if rng.random() < 0.55 or not inside:
            request = Waiting(f"{rng.choice('abc')}{number}")
            inside.add(request)
            rng.choice([queue.append, queue.appendleft])(request)
        elif rng.random() < 0.5:
            first = next(iter(queue))
            assert queue.popleft() is first
            inside.discard(first)
        else:
            gone = rng.choice(sorted(inside, key=lambda r: r.name))
            queue.remove(gone)
            inside.discard(gone)
        assert len(queue) == len(inside) == len(list(queue))
        assert set(queue) == inside
    with pytest.raises(ValueError, match="not in deque"):
        queue.remove(Waiting("z1"))


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_tenant_with_many_requests_does_not_hold_up_another(overlaps, monkeypatch):
    """Behind twenty requests of one tenant another's single one is admitted with the next free place."""
    monkeypatch.setattr(RowRunner, "overlaps", overlaps)
    core = make_core(max_running=2)
    for index in range(20):
        submit(core, f"a{index}", f"sa{index}", [index, 1, 2], tenant="a")
    core.step()
    submit(core, "b0", "sb", [99, 1, 2], tenant="b")
    events = run_until_idle(core)
    finished = [request_id for request_id in events if events[request_id][-1][0] == "finished"]
    assert len(finished) == 21
    started = [name for name, told in events.items() if told[0][0] == "started"]
    assert started.index("b0") <= 3
