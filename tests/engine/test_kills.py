"""`kill -9` of an engine that moves histories between its tiers: the next one finds no wrong page, whenever it was.

A real process with the bundled model, 6 MiB of device memory and files on disk. Its sessions are talked to in turn, so
that pages go down, to disk, and come back all the time; what it had saved by then is used by its successor.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from chatserve.engine.build import build
from chatserve.engine.config import EngineConfig
from chatserve.engine.core import EngineCore
from tests.engine.fakes import run_until_idle, submit, tokens_of

MIB = 1 << 20
NUM_SESSIONS = 4
REPLY_TOKENS = 6
NEXT = [310, 420, 530, 640]
PRELOAD = ["chatserve.engine.build", "transformers.models.llama.configuration_llama", "pytest"]  # seconds, once


def make_engine(directory: Path | None) -> EngineCore:
    """Device memory for one and a half of the sessions where there are tiers; for all where nothing ever moves."""
    tiers = {"kv_host_bytes": 2 * MIB, "kv_disk_bytes": 24 * MIB, "kv_disk_path": str(directory)} if directory else {}
    config = EngineConfig(
        model="bundled", device="cpu", num_threads=1, max_context=900,
        kv_device_bytes=(6 if directory else 64) * MIB, **tiers,
    )  # fmt: skip
    core = build(config)[0]
    core.store.note_computed = lambda *_: None  # or histories this short would rather be computed again
    return core


def reply(core: EngineCore, session_id: str, token_ids: list[int]) -> tuple[list[int], dict[str, int]]:
    """The session's next tokens, and how much of its history came from which tier."""
    name = f"{session_id}-{len(token_ids)}-{time.monotonic_ns()}"
    submit(core, name, session_id, token_ids, max_output_tokens=REPLY_TOKENS)
    events = run_until_idle(core, check=False, max_steps=1_000_000)[name]
    return tokens_of(events), events[0][2]


def conversations(number: int) -> dict[str, list[int]]:
    """What the sessions of one life begin with: nobody said it before, so all of it has to be saved."""
    generator = random.Random(number)
    return {f"life{number}-{index}": generator.choices(range(300, 1200), k=250) for index in range(NUM_SESSIONS)}


def live(directory: Path, number: int, ready: Connection) -> None:
    """The process that is killed: turn after turn, with moments in which pages go down."""
    core = make_engine(directory)
    paths = conversations(number)
    ready.send("ready")
    while True:
        for session_id, path in paths.items():
            tokens, _ = reply(core, session_id, path[:600])
            path += [*tokens, *NEXT]
            core.offload()


class Killing:
    """One directory through many deaths, and an engine beside it in which nothing ever moves."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.seed = seed
        self.num_restored = 0
        self._directory = directory
        self._chance = random.Random(seed)
        self._processes: ForkServerContext = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(PRELOAD)
        self._still = make_engine(None)

    def kill_and_compare(self, number: int) -> None:
        """One life, its end, and the first turns of the next one."""
        self._run_and_kill(number)
        core = make_engine(self._directory)
        for session_id, prompt in conversations(number).items():
            expected, _ = reply(self._still, session_id, prompt)
            path = [*prompt, *expected, *NEXT]
            tokens, cached = reply(core, session_id, path)
            assert tokens == reply(self._still, session_id, path)[0], f"seed {self.seed}, {session_id}"
            self.num_restored += cached.get("disk", 0)
        core.store.check_integrity()
        assert core.store.tiers.disk.verify().bad == [], f"seed {self.seed}"
        core.close(0.0)

    def close(self) -> None:
        """End the engine beside it."""
        self._still.close(0.0)

    def _run_and_kill(self, number: int) -> None:
        ours, theirs = self._processes.Pipe(duplex=False)
        process = self._processes.Process(target=live, args=(self._directory, number, theirs))
        process.start()
        theirs.close()
        with ours:
            assert ours.recv() == "ready"
            time.sleep(self._chance.uniform(0.0, 0.4))
            process.kill()
        process.join()
        assert process.exitcode == -9


@pytest.fixture
def killing(tmp_path: Path) -> Iterator[Killing]:
    """Its seed is new each time."""
    killing = Killing(tmp_path / "kv", seed=random.randrange(1 << 32))
    yield killing
    killing.close()


@pytest.mark.parametrize("num_kills", [5, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(3000)])])
def test_a_killed_engine_leaves_no_wrong_page(killing, num_kills):
    """After each death the store opens, every record is whole, and all sessions go on as if nothing had happened."""
    for number in range(num_kills):
        killing.kill_and_compare(number)
    assert killing.num_restored > 0
