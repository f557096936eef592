"""A model whose answers depend on every KV row of its session: a wrong, stale or foreign row changes the next token."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from chatserve.engine.core import EngineCore
from chatserve.engine.runner import FinishedStep
from chatserve.engine.scheduler import Work
from kvstore import KVLayout, KVStore, PosixMemory
from kvstore.buffers import PlainBuffers
from kvstore.tiers import Below
from kvstore.transfer import FileTransfers

VOCAB = 1000
LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=16, dtype=torch.float32, page_bytes=4096)  # 32 tokens a page


class RowRunner:
    """Writes each token's id into its row, and answers with a hash of all rows of the session.

    With `overlaps` it is a device: it computes in the order of launches, and keeps what was sampled in slots.
    """

    overlaps = False

    def __init__(self, arena: torch.Tensor) -> None:
        self._arena = arena
        self._slot_tokens: dict[int, int] = {}
        self.steps: list[list[tuple[str, int]]] = []

    def reserve(self, work: Sequence[Work]) -> None:
        pass

    def launch(self, work: Sequence[Work]) -> FinishedStep:
        self.steps.append([(item.request.request_id, item.num_tokens) for item in work])
        tokens = []
        for item in work:
            base = item.lease.base_token
            ids = self._input_ids(item)
            self._arena[base + item.start : base + item.end] = torch.tensor(ids).view(-1, 1, 1, 1, 1)
            if item.samples:
                rows = self._arena[base : base + item.end, 0, 0, 0, 0].to(torch.int64).tolist()
                tokens.append(next_token(rows))
                self._slot_tokens[item.request.slot] = tokens[-1]
        return FinishedStep(work, tokens)

    def _input_ids(self, item: Work) -> list[int]:
        known = item.request.token_ids[item.start : item.end]
        return known if len(known) == item.num_tokens else [*known, self._slot_tokens[item.request.slot]]


def next_token(token_ids: Sequence[int]) -> int:
    """What `RowRunner` answers after these ids, computed without a store."""
    digest = hashlib.blake2b(repr(list(token_ids)).encode(), digest_size=4).digest()
    return int.from_bytes(digest) % VOCAB


def expected_reply(token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """The greedy continuation of `token_ids`."""
    ids = list(token_ids)
    for _ in range(num_tokens):
        ids.append(next_token(ids))
    return ids[len(token_ids) :]


def make_core(
    *, pages: int = 256, max_context: int = 1024, max_ranges: int = 32, host_pages: int = 0, **limits: Any
) -> EngineCore:
    """An engine core over real mapped memory of `pages` pages of 32 tokens, and perhaps host memory below it."""
    memory = PosixMemory(LAYOUT.page_bytes)
    transfers = FileTransfers(memory.file, LAYOUT.page_bytes)
    below = Below(PlainBuffers(host_pages * LAYOUT.page_bytes, LAYOUT.page_bytes), transfers)
    store = KVStore(
        LAYOUT, memory, budget_bytes=pages * LAYOUT.page_bytes, max_tokens=max_context,
        max_ranges=max_ranges, fingerprint=b"fake", below=below if host_pages else None,
    )  # fmt: skip
    limits = {"max_step_tokens": 64, "max_running": 16, "max_waiting": 64} | limits
    return EngineCore(store, RowRunner(store.arena), max_context=max_context, **limits)


def submit(core: EngineCore, request_id: str, session_id: str, token_ids: Sequence[int], **fields: Any) -> None:
    """Submit a whole-history request as the client does after `need_tokens`."""
    command = {
        "verb": "submit", "request_id": request_id, "session_id": session_id, "tenant": "t", "num_history": 0,
        "history_hash": b"", "num_history_sent": 0, "token_ids": array("i", token_ids).tobytes(),
        "num_generated": 0, "num_computed": 0, "max_output_tokens": 8, "sampling": {}, "stop_token_ids": [],
        "reuse": True,
    }  # fmt: skip
    core.handle(command | fields)


def run_until_idle(core: EngineCore, *, check: bool = True, max_steps: int = 5000) -> dict[str, list[list[Any]]]:
    """Step until nothing is left; returns the events by request id. Fails when it takes more than `max_steps`."""
    events: dict[str, list[list[Any]]] = {}
    for _ in range(max_steps):
        core.step()
        if check:
            core.store.check_integrity()
        for event in core.take_events():
            events.setdefault(event[1], []).append(event)
        if core.idle:
            return events
    raise AssertionError(f"still busy after {max_steps} steps")


def tokens_of(events: Sequence[Sequence[Any]]) -> list[int]:
    """The token ids in a request's events."""
    return [token for event in events if event[0] == "tokens" for token in event[2]]
