"""Invariant 1 below the device: promoted, restored or recomputed after damage, a history gives the same tokens."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from chatserve.engine.build import build
from chatserve.engine.config import EngineConfig
from chatserve.engine.core import EngineCore
from chatserve.errors import StartupError
from kvstore.disk.files import FileCalls
from tests.engine.fakes import run_until_idle, submit, tokens_of

MIB = 1 << 20
SAVE_S = 20.0
PROMPT = [300 + index * 7 % 900 for index in range(400)]
NEXT = [310, 420, 530, 640]


def make_engine(
    directory: Path | None = None, *, device_mib: int = 6, host_mib: int = 64, dtype: str = "auto"
) -> EngineCore:
    """The bundled model with little device memory over host memory and perhaps a disk."""
    disk: dict[str, Any] = {"kv_disk_bytes": 256 * MIB, "kv_disk_path": str(directory)} if directory else {}
    config = EngineConfig(
        model="bundled", device="cpu", num_threads=1, kv_device_bytes=device_mib * MIB, max_context=900, dtype=dtype,
        kv_host_bytes=host_mib * MIB, **disk,
    )  # fmt: skip
    core, _ = build(config)
    return core


def reply(
    core: EngineCore, session_id: str, token_ids: list[int], num_tokens: int = 24
) -> tuple[list[int], dict[str, int]]:
    """The session's next tokens, and how many of its history came from which tier."""
    name = f"{session_id}-{len(token_ids)}"
    submit(core, name, session_id, token_ids, max_output_tokens=num_tokens)
    events = run_until_idle(core, check=False, max_steps=200_000)[name]
    core.store.check_integrity()
    return tokens_of(events), events[0][2]


def push_out(core: EngineCore) -> None:
    """Copy everything down, then fill the device with others' histories."""
    while core.offload():
        pass
    for number in range(3):
        reply(core, f"other{number}", [400 + number, *reversed(PROMPT)], 2)


@pytest.fixture(scope="module")
def expected() -> tuple[list[int], list[int]]:
    """What two turns say when nothing ever moves."""
    core = make_engine(device_mib=64)
    first, _ = reply(core, "s", PROMPT)
    second, cached = reply(core, "s", [*PROMPT, *first, *NEXT])
    assert cached == {"device": len(PROMPT) + len(first) - 1}
    core.close(SAVE_S)
    return first, second


def test_offloaded_and_promoted_equals_never_moved(expected):
    """The second turn's history comes back from host memory."""
    core = make_engine()
    first, _ = reply(core, "s", PROMPT)
    push_out(core)
    second, cached = reply(core, "s", [*PROMPT, *first, *NEXT])
    assert (first, second) == expected
    assert cached["host"] > 300
    core.close(SAVE_S)


@pytest.mark.parametrize("graceful", [True, False])
def test_restored_from_disk_equals_never_moved(expected, tmp_path, graceful):
    """A new engine on the same directory, after a proper end and after none, goes on with the same tokens."""
    core = make_engine(tmp_path / "kv")
    first, _ = reply(core, "s", PROMPT)
    if graceful:
        core.close(SAVE_S)
    else:
        while core.offload():
            pass
        core.store.tiers.close()  # gives up the directory's lock, which a killed process cannot hold
    core = make_engine(tmp_path / "kv")
    second, cached = reply(core, "s", [*PROMPT, *first, *NEXT])
    assert (first, second) == expected
    assert cached == {"device": 0, "disk": len(PROMPT) + len(first) - 1}
    core.close(SAVE_S)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_damaged_records_are_computed_again(expected, tmp_path, place):
    """A flipped byte anywhere in the records costs time, never the answer."""
    core = make_engine(tmp_path / "kv")
    first, _ = reply(core, "s", PROMPT)
    core.close(SAVE_S)
    largest = max((tmp_path / "kv").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[int(len(data) * place)] ^= 0x10
    largest.write_bytes(data)
    core = make_engine(tmp_path / "kv")
    path = [*PROMPT, *first, *NEXT]
    submit(core, "again", "s", path, max_output_tokens=24, num_computed=len(path) - len(NEXT))
    events = run_until_idle(core, check=False, max_steps=200_000)["again"]
    assert (first, tokens_of(events)) == expected
    _, _, cached, *_, reason = events[0]
    assert cached.get("disk", 0) < 400
    assert reason == "checksum_failed"
    core.close(SAVE_S)


def test_histories_in_another_number_format_are_not_used(tmp_path):
    """What was saved in float32 is a miss for bfloat16, whose pages mean something else."""
    core = make_engine(tmp_path / "kv")
    first, _ = reply(core, "s", PROMPT)
    core.close(SAVE_S)
    core = make_engine(tmp_path / "kv", dtype="bfloat16")
    submit(core, "again", "s", [*PROMPT, *first, *NEXT], num_computed=len(PROMPT) + len(first))
    _, _, cached, *_, reason = run_until_idle(core, check=False, max_steps=200_000)["again"][0]
    assert cached == {"device": 0}
    assert reason == "model_changed"
    core.close(SAVE_S)


def test_a_second_engine_on_the_directory_is_refused(tmp_path):
    """Two servers would overwrite each other's records: the second one is told whose the directory is."""
    core = make_engine(tmp_path / "kv")
    with pytest.raises(StartupError, match="--kv-disk-path"):
        make_engine(tmp_path / "kv")
    core.close(SAVE_S)


def test_a_disk_that_fails_costs_nothing_but_time(expected, tmp_path, monkeypatch):
    """Every write refused: histories stay where they are or are computed again, and serving goes on."""
    core = make_engine(tmp_path / "kv")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileCalls, "write", full)
    first, _ = reply(core, "s", PROMPT)
    push_out(core)
    second, cached = reply(core, "s", [*PROMPT, *first, *NEXT])
    assert (first, second) == expected
    assert cached.get("disk", 0) == 0
    assert core.store.tiers.disk.state == "read_only"
    core.close(SAVE_S)


def test_a_cancelled_request_leaves_what_came_back(expected):
    """Cancelled while its history is on its way, a request ends, and the next one finds the rows."""
    core = make_engine()
    first, _ = reply(core, "s", PROMPT)
    push_out(core)
    submit(core, "gone", "s", [*PROMPT, *first, *NEXT], max_output_tokens=4)
    core.step()
    core.handle({"verb": "cancel", "request_id": "gone"})
    assert run_until_idle(core, check=False)["gone"][-1][2] == "cancelled"
    while core.offload():
        pass
    second, _ = reply(core, "s", [*PROMPT, *first, *NEXT, *[]])
    assert second == expected[1]
    core.close(SAVE_S)
