"""`kill -9` at random instants of a process that puts and makes room: what it acknowledged is there, and right."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kvstore.test_disk import bytes_on_disk, key_of, open_tier, payload_of, put, read, right_records

ROOT = Path(__file__).parents[2]
PAGES = 60

# The package without its parent, whose torch takes seconds to load: the tier does without it.
CHILD = f"""
import hashlib, importlib.machinery, sys, types
parent = types.ModuleType("kvstore"); parent.__path__ = [{str(ROOT / "kvstore")!r}]; sys.modules["kvstore"] = parent
from kvstore.disk import DiskTier
assert "torch" not in sys.modules and "numpy" not in sys.modules
path, budget_bytes, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
key_of = lambda number: hashlib.sha256(b"page %d" % number).digest()
with DiskTier(path, budget_bytes=budget_bytes, fingerprint=b"model", page_bytes=256) as tier:
    while True:
        batch = [key_of(number + n) for n in range(3)]
        assert tier.put([(key, key * 8) for key in batch]) == 3
        print(number, flush=True)
        for used in range(max(0, number - 90), number, 7):
            tier.touch(key_of(used))
        if number % 30 == 0:
            tier.drop([key_of(number - 5), key_of(number - 6)])
            tier.compact()
        number += 3
"""


def run_and_kill(path, budget_bytes, first, delay_s):
    """Run the child, kill it `delay_s` after its first acknowledgement; returns all it acknowledged."""
    command = [sys.executable, "-c", CHILD, str(path), str(budget_bytes), str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        acknowledged = [int(child.stdout.readline())]
        time.sleep(delay_s)
        child.send_signal(signal.SIGKILL)
        acknowledged += map(int, child.stdout.read().splitlines())
    assert child.returncode == -signal.SIGKILL
    return acknowledged


def kill_often(path, times, seed):
    """One directory through many deaths."""
    chance = random.Random(seed)
    number, held = 0, 0
    with open_tier(path, pages=PAGES) as tier:
        budget_bytes = tier.budget_bytes
    for _ in range(times):
        acknowledged = run_and_kill(path, budget_bytes, number, chance.uniform(0, 0.25))
        assert bytes_on_disk(path) <= budget_bytes
        with open_tier(path, pages=PAGES) as tier:
            for last in range(acknowledged[-1], acknowledged[-1] + 3):
                assert read(tier, key_of(last)) == payload_of(key_of(last)), f"seed {seed}"
            held = right_records(tier)
            assert tier.verify().bad == []
        number = acknowledged[-1] + 3
    assert number > 3 * times
    assert held > 20


def test_killed(tmp_path):
    """Five deaths."""
    kill_often(tmp_path / "pages", 5, seed=random.randrange(1 << 32))


@pytest.mark.soak
def test_killed_many_times(tmp_path):
    """Two hundred."""
    kill_often(tmp_path / "pages", 200, seed=random.randrange(1 << 32))


def test_killed_process_holds_nothing(tmp_path):
    """The lock of a dead process does not keep the next one out, and its id is not in the way."""
    path = tmp_path / "pages"
    with open_tier(path, pages=PAGES) as tier:
        budget_bytes = tier.budget_bytes
    run_and_kill(path, budget_bytes, 0, 0.0)
    with contextlib.closing(open_tier(path, pages=PAGES)) as tier:
        assert put(tier, 5000)
        assert (path / "lock").read_text() == f"{os.getpid()}\n"
