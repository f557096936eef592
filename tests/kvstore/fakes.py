"""Memory that refuses on demand, memory without a system, and rows that say whose they are."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvstore import KVLayout, KVStore, Lease, MemoryRefused, PosixMemory
from kvstore.arrays import PageArray
from kvstore.linux import LinuxCalls

PAGE_BYTES = 4096
TOKEN_SHAPES = {
    384: (1, 1, 48),
    640: (1, 1, 80),
    1024: (2, 2, 32),
    4096: (4, 2, 64),
    10240: (4, 5, 64),
    12288: (4, 6, 64),
}


class Countdown:
    """Raises MemoryRefused at the nth `tick` from now, once."""

    def __init__(self) -> None:
        self.remaining = 0

    def arm(self, nth: int) -> None:
        self.remaining = nth

    def tick(self, call: str) -> None:
        self.remaining -= 1
        if self.remaining == 0:
            raise MemoryRefused(call, "refused by the test")


class FlakyMemory(PosixMemory):
    """Real memory whose nth create, map or settle is refused."""

    def __init__(self, page_bytes: int = PAGE_BYTES, max_mappings: int | None = None) -> None:
        super().__init__(page_bytes, max_mappings)
        self.countdown = Countdown()

    def create(self, num_pages: int) -> list[int]:
        self.countdown.tick("create")
        return super().create(num_pages)

    def map(self, offset: int, pages: PageArray) -> None:
        self.countdown.tick("map")
        super().map(offset, pages)

    def map_readonly(self, offset: int, pages: PageArray) -> None:
        self.countdown.tick("map_readonly")
        super().map_readonly(offset, pages)

    def map_guard(self, offset: int, num_pages: int) -> None:
        self.countdown.tick("map_guard")
        super().map_guard(offset, num_pages)

    def settle(self) -> None:
        self.countdown.tick("settle")
        super().settle()


class FlakyCalls(LinuxCalls):
    """Real system calls, counted by kind, of which the nth that maps or allocates is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.countdown = Countdown()
        self.num_map_calls = 0

    def map_file(self, *arguments: Any, writable: bool) -> None:
        self.countdown.tick("map_file")
        self.num_map_calls += 1
        super().map_file(*arguments, writable=writable)

    def allocate(self, *arguments: Any) -> None:
        self.countdown.tick("allocate")
        super().allocate(*arguments)

    def punch(self, *arguments: Any) -> None:
        self.countdown.tick("punch")
        super().punch(*arguments)


class PlainMemory:
    """Pages as bytearrays, for the pool alone: no addresses, no system."""

    page_bytes = PAGE_BYTES

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self.countdown = Countdown()

    def create(self, num_pages: int) -> list[int]:
        self.countdown.tick("create")
        unused = [page for page in range(len(self.pages) + num_pages) if page not in self.pages][:num_pages]
        self.pages |= {page: bytearray(8) for page in unused}
        return unused

    def create_guards(self) -> int:
        return 7

    def release(self, pages: PageArray) -> None:
        self.countdown.tick("release")
        for page in pages.tolist():
            del self.pages[page]

    def zero(self, pages: PageArray) -> None:
        for page in pages.tolist():
            self.pages[page][:] = bytes(8)


class FakeDriver:
    """CUDA's rules for mappings, kept in dictionaries; `running.clear()` stops the stream, whose events then wait."""

    def __init__(self):
        self.memory = {}  # by handle: its bytes
        self.mappings = {}  # by address: size, handle, and whether it is writable, None without access
        self.numbers = itertools.count(1)
        self.running = threading.Event()
        self.running.set()
        self.attach = self.close = lambda: None
        self.granularity = lambda: PAGE_BYTES
        self.create_event = lambda **_: threading.Event()
        self.create_stream = lambda: next(self.numbers)
        self.destroy_stream = lambda *_: None
        self.elapsed_s = lambda *_: 0.001
        self.finish_stream = lambda _: self.running.wait()
        self.pinned = {}  # by address: bytes
        self.pin, self.unpin = self.pinned.__setitem__, self.pinned.__delitem__
        self.destroy_event = self.address_free = self.record_event = lambda *_: None
        self.query_event = lambda _: self.running.is_set()
        self.wait_event = lambda _: self.running.wait()
        self.reserve = lambda _: next(self.numbers) << 50
        self.release = lambda handle: self.memory.__delitem__(handle)
        self.tensor = lambda _, num_bytes: torch.empty(num_bytes, dtype=torch.uint8, device="meta")

    def create(self, num_bytes):
        handle = next(self.numbers)
        self.memory[handle] = np.full(num_bytes, 255, np.uint8)
        return handle

    def map(self, address, num_bytes, handle):
        assert not any(start < address + num_bytes and address < start + size
                       for start, (size, *_) in self.mappings.items())  # fmt: skip
        assert self.memory[handle].nbytes == num_bytes
        self.mappings[address] = (num_bytes, handle, None)

    def set_access(self, address, num_bytes, *, writable):
        for start in self._whole(address, num_bytes):
            self.mappings[start] = (*self.mappings[start][:2], writable)

    def unmap(self, address, num_bytes):
        for start in self._whole(address, num_bytes):
            del self.mappings[start]

    def zero(self, address, num_bytes, stream):
        for start in self._whole(address, num_bytes):
            self.memory[self.mappings[start][1]][:] = 0

    def copy(self, source, target, num_bytes, stream):
        self.memory[self.mappings[target][1]][:num_bytes] = self.memory[self.mappings[source][1]][:num_bytes]

    def copy_down(self, address, host, num_bytes, stream):
        ctypes.memmove(host, self.memory[self.mappings[address][1]].ctypes.data, num_bytes)

    def copy_up(self, address, host, num_bytes, stream):
        ctypes.memmove(self.memory[self.mappings[address][1]].ctypes.data, host, num_bytes)

    def _whole(self, address, num_bytes):
        """Addresses of the mappings that make up a range, which has no hole and divides none."""
        inside = {a: size for a, (size, *_) in self.mappings.items() if address <= a < address + num_bytes}
        assert sum(inside.values()) == num_bytes
        return list(inside)


DRIVER_CALLS = ["create", "release", "map", "set_access", "unmap", "zero", "copy", "create_event", "record_event",
                "query_event", "wait_event"]  # fmt: skip
TRANSFER_CALLS = ["create_event", "record_event", "copy_down", "copy_up"]


def fail_call(driver: Any, name: str, nth: int = 1, times: int = 1) -> Countdown:
    """The nth call of a driver's method from now on is refused, `times` of them in a row."""
    call, countdown = getattr(driver, name), Countdown()
    countdown.arm(nth)

    def refuse(*arguments: Any, **options: Any) -> Any:
        countdown.remaining -= 1
        if -times < countdown.remaining <= 0:
            raise MemoryRefused(name, "refused by the test")
        return call(*arguments, **options)

    setattr(driver, name, refuse)
    return countdown


def make_layout(token_bytes: int = 384, page_bytes: int = PAGE_BYTES) -> KVLayout:
    """A layout of float32 rows with this many bytes a token."""
    num_layers, num_kv_heads, head_dim = TOKEN_SHAPES[token_bytes]
    layout = KVLayout(num_layers, num_kv_heads, head_dim, torch.float32, page_bytes)
    assert layout.token_bytes == token_bytes
    return layout


def make_store(*, token_bytes: int = 384, pages: int = 64, max_ranges: int = 8, **options: Any) -> KVStore:
    """A store over real memory of 4 KiB pages."""
    layout = make_layout(token_bytes)
    options = {"max_tokens": 512, "fingerprint": b"model"} | options
    memory = options.pop("memory", None) or FlakyMemory()
    return KVStore(layout, memory, budget_bytes=pages * PAGE_BYTES, max_ranges=max_ranges, **options)


def row_marks(salt: bytes, token_ids: Sequence[int]) -> npt.NDArray[np.int64]:
    """One int64 a token, different for any other salt or prefix: what `write_rows` fills the token's row with."""
    return _row_marks(salt, tuple(token_ids))


@functools.lru_cache(maxsize=4096)
def _row_marks(salt: bytes, token_ids: tuple[int, ...]) -> npt.NDArray[np.int64]:
    digest, marks = hashlib.blake2b(salt).digest(), []
    for token in token_ids:
        digest = hashlib.blake2b(digest + token.to_bytes(4, "big"), digest_size=16).digest()
        marks.append(int.from_bytes(digest[:8], "big", signed=True))
    return np.array(marks, np.int64)


def rows_of(store: KVStore, base_token: int, start: int, stop: int) -> npt.NDArray[np.int64]:
    """Rows [start, stop) of the session at `base_token` as int64 [stop - start, token_bytes / 8]."""
    rows = store.arena[base_token + start : base_token + stop]
    return rows.flatten(start_dim=1).view(torch.int64).numpy()  # numpy: one thread is faster for so little


def write_rows(store: KVStore, lease: Lease, salt: bytes, token_ids: Sequence[int]) -> None:
    """Write and commit the rows of `token_ids` behind `lease.kv_length`, of which the first ones are there."""
    start, stop = lease.kv_length, len(token_ids)
    if start < stop:
        lease.grow(stop)
        rows_of(store, lease.base_token, start, stop)[:] = row_marks(salt, token_ids)[start:, None]
        lease.commit(token_ids[start:])


def assert_rows(store: KVStore, base_token: int, salt: bytes, token_ids: Sequence[int]) -> None:
    """Fails unless the session's first rows are those of `token_ids`, every byte."""
    assert (rows_of(store, base_token, 0, len(token_ids)) == row_marks(salt, token_ids)[:, None]).all()


def run_turn(store: KVStore, session_id: str, salt: bytes, token_ids: Sequence[int], **options: Any) -> int:
    """Lease, check what was found, write the rest, release; returns the cached tokens."""
    lease = store.lease(session_id, salt, token_ids, **options)
    try:
        assert_rows(store, lease.base_token, salt, token_ids[: lease.kv_length])
        write_rows(store, lease, salt, token_ids)
    finally:
        lease.release()
        store.check_integrity()
    return lease.num_cached_tokens


def base_token_of(store: KVStore, session_id: str) -> int:
    """Arena row of a resident session's first token."""
    return store._residency.sessions[session_id].tensor.offset // store.layout.token_bytes


def pages_of(store: KVStore, session_id: str) -> list[int]:
    """Pages in a resident session's range, in order."""
    return store._residency.sessions[session_id].tensor.pages.view.tolist()


def as_pages(*pages: int) -> PageArray:
    return np.array(pages, np.int64)
