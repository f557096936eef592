"""Copies between CUDA pages and pinned host memory, a stream each way, beside the compute stream.

A copy engine serves all streams in the order of their calls: behind a gigabyte that is queued at once, the few
kilobytes that a step needs when it begins wait for 20 ms (measured on an H200). So at each tick no more is queued than
is copied while the step that runs then goes on, and nothing that would begin just when the next one does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.buffers import Buffer
from kvstore.driver import CudaDriver
from kvstore.errors import MemoryRefused

LINK_BYTES_PER_S = 50e9
STEP_SHARE = 0.4  # of a step's time, in which copies hold up nobody: what the next one needs is queued after that
IDLE_BYTES = 256 << 20  # queued while nothing runs: 5 ms, which a request that comes now may have to wait
Copy = Callable[[int, int, int, int], None]  # device address, host address, bytes, stream


class CudaTransfer:
    """See `Transfer`. `num_left` of its copies have not run yet, as far as the last look at the stream says."""

    def __init__(self, num_left: int, ready: Any) -> None:
        self.num_left = num_left
        self.ready = ready  # an event behind what its pages wait for; None once that has happened
        self.seconds = 0.0
        self._is_refused = False

    def refuse(self) -> None:
        """The driver does not do it; what was queued of it has run."""
        self.num_left, self._is_refused = 0, True

    def done(self) -> bool:
        """See `Transfer.done`."""
        return not self.num_left

    def failed(self) -> bool:
        """See `Transfer.failed`."""
        return self._is_refused


class CudaTransfers:
    """See `Transfers`. `home` gives a page's address; buffers are pinned, else the calls would wait for the device.

    A batch begins at a tick after what the compute stream was given before it has run: rows are read when they are
    written, and pages are filled when they are zeroed.
    """

    batch_bytes = 128 << 20
    max_batches = 4

    def __init__(self, driver: CudaDriver, compute_stream: int, home: Callable[[int], int]) -> None:
        self._driver = driver
        self._compute_stream = compute_stream
        self._home = home
        self._down_lane = _Lane(driver, driver.copy_down)
        self._up_lane = _Lane(driver, driver.copy_up)
        self._limit_bytes = IDLE_BYTES

    def down(self, pages: Sequence[int], buffers: Sequence[Buffer]) -> CudaTransfer:
        """See `Transfers.down`."""
        return self._begin(self._down_lane, pages, buffers)

    def up(self, pages: Sequence[int], buffers: Sequence[Buffer]) -> CudaTransfer:
        """See `Transfers.up`."""
        return self._begin(self._up_lane, pages, buffers)

    def pace(self, busy_s: float) -> None:
        """See `Transfers.pace`."""
        self._limit_bytes = int(busy_s * STEP_SHARE * LINK_BYTES_PER_S) if busy_s else IDLE_BYTES
        for lane in (self._down_lane, self._up_lane):
            lane.go_on(self._limit_bytes)

    def close(self) -> None:
        """See `Transfers.close`."""
        for lane in (self._down_lane, self._up_lane):
            lane.close()

    def _begin(self, lane: _Lane, pages: Sequence[int], buffers: Sequence[Buffer]) -> CudaTransfer:
        try:
            ready = self._driver.create_event()
            self._driver.record_event(ready, self._compute_stream)
        except MemoryRefused:
            transfer = CudaTransfer(0, None)
            transfer.refuse()
            return transfer
        transfer = CudaTransfer(len(pages), ready)
        lane.add(transfer, [self._home(page) for page in pages], buffers)
        lane.go_on(self._limit_bytes)
        return transfer


@dataclass(frozen=True, slots=True)
class _Copy:
    """One page's copy."""

    transfer: CudaTransfer
    home: int
    buffer: Buffer

    @property
    def num_bytes(self) -> int:
        return self.buffer.nbytes


@dataclass(frozen=True, slots=True)
class _Group:
    """Copies that were queued together, between two events."""

    copies: list[_Copy]
    began: Any
    ended: Any

    @property
    def num_bytes(self) -> int:
        return sum(copy.num_bytes for copy in self.copies)


class _Lane:
    """One way: copies still to be queued, and groups of them that have not run yet."""

    def __init__(self, driver: CudaDriver, copy: Copy) -> None:
        self._driver = driver
        self._copy = copy
        self._stream = driver.create_stream()
        self._waiting: deque[_Copy] = deque()
        self._groups: deque[_Group] = deque()

    def add(self, transfer: CudaTransfer, homes: Sequence[int], buffers: Sequence[Buffer]) -> None:
        """These copies come next."""
        self._waiting += [_Copy(transfer, home, buffer) for home, buffer in zip(homes, buffers, strict=True)]

    def go_on(self, limit_bytes: int) -> None:
        """Queue the next copies, so that at most so many bytes, but at least one page, stand in the stream."""
        while self._groups and self._driver.query_event(self._groups[0].ended):
            self._take(self._groups.popleft())
        room = limit_bytes - sum(group.num_bytes for group in self._groups)
        copies: list[_Copy] = []
        while self._can_begin() and (self._waiting[0].num_bytes <= room or not (copies or self._groups)):
            copies.append(self._waiting.popleft())
            room -= copies[-1].num_bytes
        self._queue([copy for copy in copies if not copy.transfer.failed()])

    def close(self) -> None:
        """Finish what was begun."""
        while self._waiting or self._groups:
            if self._waiting and self._waiting[0].transfer.ready is not None:
                self._driver.wait_event(self._waiting[0].transfer.ready)
            self.go_on(IDLE_BYTES)
            self._driver.finish_stream(self._stream)
        self._driver.destroy_stream(self._stream)

    def _can_begin(self) -> bool:
        """Whether there is a next copy, and what its page waits for has happened."""
        if not self._waiting:
            return False
        transfer = self._waiting[0].transfer
        if transfer.ready is not None and self._driver.query_event(transfer.ready):
            self._driver.destroy_event(transfer.ready)
            transfer.ready = None
        return transfer.ready is None

    def _queue(self, copies: list[_Copy]) -> None:
        """Give copies to the driver; where it refuses, all transfers that they belong to have failed."""
        if not copies:
            return
        try:
            began = self._record()
            for copy in copies:
                self._copy(copy.home, copy.buffer.ctypes.data, copy.num_bytes, self._stream)
            self._groups.append(_Group(copies, began, self._record()))
        except MemoryRefused:
            self._driver.finish_stream(self._stream)
            for copy in copies:
                copy.transfer.refuse()

    def _record(self) -> Any:
        event = self._driver.create_event(timed=True)
        self._driver.record_event(event, self._stream)
        return event

    def _take(self, group: _Group) -> None:
        """These copies have run; each took its part of the time."""
        seconds_a_byte = self._driver.elapsed_s(group.began, group.ended) / group.num_bytes
        for copy in group.copies:
            if not copy.transfer.failed():
                copy.transfer.num_left -= 1
                copy.transfer.seconds += copy.num_bytes * seconds_a_byte
        self._driver.destroy_event(group.began)
        self._driver.destroy_event(group.ended)
