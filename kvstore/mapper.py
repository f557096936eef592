"""One thread that makes the driver's mappings agree with a table, maps first, unmapping behind events on a stream.

Every place has what the table wants there and what is there now; whoever changes the table names the places. A place
is unmapped only when everything that was queued on the stream at its change has run. It knows places and entries, not
pages' owners or sessions.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.driver import CudaDriver
from kvstore.errors import CudaFault, MemoryRefused
from kvstore.linux import sparse_zeros
from kvstore.table import READ_ONLY, Entries, PageTable

HALF_MAPPED = -8  # instead of an entry: mapped without access, left by a call that failed; never what a table wants
MAP_BATCH = 32  # changes of the table that are mapped without telling those who wait
UNMAP_BATCH = 32  # places between two looks at what is to be mapped
FENCE_CHECK_S = 0.005  # how often events are looked at while nobody waits for one

Job = Callable[[], None]
Mask = npt.NDArray[np.bool_]


def guard_entries(size: int) -> Entries:
    """What stands at the places of a guard of GUARD_SIZES pages, which is one mapping: each says where that begins."""
    return -(size + np.arange(size, dtype=np.int64))


GUARD_SIZES = (4, 2, 1)
GUARD_MIDDLES = [int(entry) for size in GUARD_SIZES for entry in guard_entries(size)[1:]]


class Mapper:
    """The thread, what it has mapped (`actual`), and what it still has to do, all under the condition `changed`.

    `handle_of` gives the memory of an entry, `idle` the next thing to do when there is nothing else, or None.
    """

    def __init__(
        self,
        driver: CudaDriver,
        stream: int,
        table: PageTable,
        address: int,
        handle_of: Callable[[int], int],
        idle: Callable[[], Job | None],
    ) -> None:
        self.changed = threading.Condition()
        self.actual = sparse_zeros(len(table.entries))
        self._driver, self._stream = driver, stream
        self._table, self._address = table, address
        self._handle_of, self._idle = handle_of, idle
        self._fences = sparse_zeros(len(table.entries))  # the serial of the event to await before unmapping
        self._serial = self._passed = 0
        self._events: deque[tuple[int, Any]] = deque()  # serial, event or None where recording was refused
        self._spare_events: list[Any] = []
        self._to_map: deque[slice] = deque()
        self._blocked: list[slice] = []  # to be mapped where something else still is
        self._to_unmap: deque[tuple[int, slice]] = deque()  # serial of the event to await first
        self._failed_maps: list[slice] = []
        self._failed_unmaps: list[slice] = []
        self._refusal: MemoryRefused | None = None
        self._mapping = self._unmapping = self._closing = False
        self._num_waiting = 0  # threads that wait for unmapping
        self._fault: CudaFault | None = None
        self._thread = threading.Thread(target=self._run, name="kvstore-mapper", daemon=True)

    def start(self) -> None:
        """Begin; once."""
        self._thread.start()

    def change(self, places: slice, entries: Entries) -> None:
        """Put entries in the table, to be made so; returns at once."""
        with self.changed:
            if self._table.entries[places].any():
                self._fence(places)
            self._retry_unmaps()  # where these are in the way of what is to be mapped now
            self._table.put(places, entries)
            if entries.any():
                self._to_map.append(places)
            self.changed.notify_all()

    def settle(self) -> None:
        """Return when all that the table wants is mapped; MemoryRefused when that fails twice."""
        with self.changed:
            self._wait(lambda: not self._has_maps)
            if not self._failed_maps:
                return
            self._retry()
            self._wait(lambda: not self._has_maps)
            if self._failed_maps and self._refusal:
                raise self._refusal

    def drain(self) -> None:
        """Return when nothing is mapped any more that the table does not want; MemoryRefused when that fails twice."""
        with self.changed:
            self._wait(lambda: not self._has_unmaps)
            if not self._failed_unmaps:
                return
            self._retry()
            self._wait(lambda: not self._has_unmaps)
            if self._failed_unmaps and self._refusal:
                raise self._refusal

    def unsettled(self) -> npt.NDArray[np.int64]:
        """Places that are not as the table wants them, those of refused calls excepted."""
        with self.changed:
            touched = len(self._table.touched)
            different = self.actual[:touched] != self._table.touched
            for places in (*self._failed_maps, *self._failed_unmaps):
                different[places] = False
            return np.flatnonzero(different)

    def wait_until(self, done: Callable[[], bool]) -> None:
        """With `changed` held: sleep until `done`, asked whenever the thread has done something."""
        self.changed.wait_for(lambda: done() or self._fault is not None)
        if self._fault is not None:
            raise self._fault

    def synchronize(self) -> None:
        """Return when everything queued on the stream so far has run."""
        event = self._new_event()
        self._driver.record_event(event, self._stream)
        self._driver.wait_event(event)
        self._spare_events.append(event)

    def close(self) -> None:
        """End the thread, wait for the stream, and unmap everything."""
        with self.changed:
            self._closing = True
            self.changed.notify_all()
        self._thread.join()
        if self._fault is not None:
            raise self._fault
        self.synchronize()
        num_touched = len(self._table.touched)
        for start, stop in _runs(self.actual[:num_touched] != 0):
            self._driver.unmap(self._address_of(start), (stop - start) * self._table.page_bytes)
        for event in (*self._spare_events, *(event for _, event in self._events if event is not None)):
            self._driver.destroy_event(event)

    @property
    def _has_maps(self) -> bool:
        return bool(self._mapping or self._to_map or self._blocked)

    @property
    def _has_unmaps(self) -> bool:
        return bool(self._unmapping or self._to_unmap)

    def _wait(self, done: Callable[[], bool]) -> None:
        self._num_waiting += 1
        self.changed.notify_all()
        try:
            self.wait_until(done)
        finally:
            self._num_waiting -= 1

    def _fence(self, places: slice) -> None:
        """These places may be unmapped once the stream has come as far as it is queued now."""
        self._serial += 1
        self._events.append((self._serial, self._record()))
        self._fences[places] = self._serial
        self._to_unmap.append((self._serial, places))

    def _record(self) -> Any:
        """An event on the stream; None when refused: then the thread records one later, which is only later."""
        try:
            event = self._new_event()
            self._driver.record_event(event, self._stream)
        except MemoryRefused:
            return None
        return event

    def _new_event(self) -> Any:
        return self._spare_events.pop() if self._spare_events else self._driver.create_event()

    def _retry(self) -> None:
        self._to_map.extend(self._failed_maps)
        self._failed_maps.clear()
        self._retry_unmaps()
        self.changed.notify_all()

    def _retry_unmaps(self) -> None:
        self._to_unmap.extend((0, places) for places in self._failed_unmaps)
        self._failed_unmaps.clear()

    def _run(self) -> None:
        ended: CudaFault | None = CudaFault("the mapping thread", "it has ended")
        try:
            self._driver.attach()
            self._work()
            ended = None
        except CudaFault as fault:
            ended = fault
        finally:
            with self.changed:
                self._fault = ended
                self.changed.notify_all()

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            with contextlib.suppress(MemoryRefused):  # only from awaiting an event, which the next job does again
                job()

    def _next_job(self) -> Job | None:
        """The most urgent thing to do, waiting for one; None at the end."""
        with self.changed:
            while not self._closing:
                self._pass_events()
                job = self._map_job() or self._unmap_job() or self._event_job() or self._idle()
                if job is not None:
                    return job
                self.changed.wait(FENCE_CHECK_S if self._to_unmap else None)
        return None

    def _pass_events(self) -> None:
        while self._events:
            serial, event = self._events[0]
            if event is None:
                event = self._record()
                self._events[0] = (serial, event)
            if event is None or not self._has_completed(event):
                return
            self._passed = serial
            self._events.popleft()
            self._spare_events.append(event)

    def _has_completed(self, event: Any) -> bool:
        with contextlib.suppress(MemoryRefused):
            return self._driver.query_event(event)
        return False

    def _map_job(self) -> Job | None:
        if not self._to_map:
            return None
        count = min(MAP_BATCH, len(self._to_map))
        batch = [self._to_map.popleft() for _ in range(count)]
        self._mapping = True
        return lambda: self._map_all(batch)

    def _plan(self, places: slice) -> tuple[Entries, Mask]:
        """What is wanted at these places, and where it can be mapped now."""
        with self.changed:
            wanted, actual = self._table.entries[places].copy(), self.actual[places]
            free = actual == 0
            if not free.all() and ((wanted != 0) & ~free & (wanted != actual)).any():
                self._blocked.append(places)
        return wanted, _without_parts((wanted != 0) & free, wanted)

    def _map_all(self, batch: list[slice]) -> None:
        for places in batch:
            self._map(places, *self._plan(places))
        with self.changed:
            self._mapping = False
            self.changed.notify_all()

    def _map(self, places: slice, wanted: Entries, todo: Mask) -> None:
        try:
            for start, stop in _runs(todo):
                self._map_run(places.start + start, wanted[start:stop])
        except MemoryRefused as refusal:
            with self.changed:
                self._failed_maps.append(places)
                self._refusal = refusal

    def _map_run(self, place: int, entries: Entries) -> None:
        """Map entries where nothing is; after a failure what was mapped is to be unmapped again."""
        num_mapped = 0
        try:
            for start, stop in _blocks(entries):
                num_bytes = (stop - start) * self._table.page_bytes
                self._driver.map(self._address_of(place + start), num_bytes, self._handle_of(int(entries[start])))
                num_mapped = stop
            for start, stop, writable in _by_access(entries):
                num_bytes = (stop - start) * self._table.page_bytes
                self._driver.set_access(self._address_of(place + start), num_bytes, writable=writable)
        except MemoryRefused:
            self._abandon(slice(place, place + num_mapped))
            raise
        with self.changed:
            self.actual[place : place + len(entries)] = entries

    def _abandon(self, places: slice) -> None:
        if places.stop > places.start:
            with self.changed:
                self.actual[places] = HALF_MAPPED
                self._to_unmap.appendleft((0, places))

    def _unmap_job(self) -> Job | None:
        if not self._to_unmap or self._to_unmap[0][0] > self._passed:
            return None
        serial, places = self._to_unmap.popleft()
        places = self._first_batch(serial, places)
        actual = self.actual[places]
        todo = (actual != 0) & (actual != self._table.entries[places]) & (self._fences[places] <= self._passed)
        todo = _without_parts(todo, actual)
        self._unmapping = True
        return lambda: self._unmap(places, todo)

    def _first_batch(self, serial: int, places: slice) -> slice:
        """So many places of pages, of which any may begin a batch, that mapping does not wait long; the rest later."""
        middle = places.start + UNMAP_BATCH
        if middle >= places.stop or (self.actual[places] < 0).any():
            return places
        self._to_unmap.appendleft((serial, slice(middle, places.stop)))
        return slice(places.start, middle)

    def _unmap(self, places: slice, todo: Mask) -> None:
        refusal = None
        try:
            for start, stop in _runs(todo):
                self._unmap_run(places.start + start, places.start + stop)
        except MemoryRefused as error:
            refusal = error
        with self.changed:
            self._unmapping = False
            self._unblock(places, refusal)
            self.changed.notify_all()

    def _unmap_run(self, start: int, stop: int) -> None:
        self._driver.unmap(self._address_of(start), (stop - start) * self._table.page_bytes)
        with self.changed:
            self.actual[start:stop] = 0

    def _unblock(self, places: slice, refusal: MemoryRefused | None) -> None:
        if refusal is None:
            self._to_map.extend(self._blocked)
        else:
            self._failed_unmaps.append(places)
            self._failed_maps.extend(self._blocked)
            self._refusal = refusal
        self._blocked.clear()

    def _event_job(self) -> Job | None:
        """Sleep on the next event, where someone waits for what it holds up."""
        wanted = self._num_waiting and self._to_unmap and self._events
        event = self._events[0][1] if wanted else None
        return None if event is None else lambda: self._driver.wait_event(event)

    def _address_of(self, place: int) -> int:
        return self._address + place * self._table.page_bytes


def _blocks(entries: Entries) -> Iterator[tuple[int, int]]:
    """The [start, stop) of each mapping: one place, or those of a guard."""
    starts = [place for place, entry in enumerate(entries.tolist()) if entry not in GUARD_MIDDLES]
    yield from pairwise([*starts, len(entries)])


def _without_parts(todo: Mask, entries: Entries) -> Mask:
    """What to do less guards that are only partly in it: whoever names all their places does them."""
    whole: Mask = (entries >= 0) | (entries == HALF_MAPPED)
    if whole.all():
        return todo
    for start in np.flatnonzero(np.isin(entries, [-size for size in GUARD_SIZES])).tolist():
        stop = start - int(entries[start])
        whole[start:stop] = stop <= len(entries) and todo[start:stop].all()
    return todo & whole


def _by_access(entries: Entries) -> Iterator[tuple[int, int, bool]]:
    """The maximal [start, stop) with the same access, and whether that is writable."""
    start = 0
    for writable, run in itertools.groupby(entries.tolist(), lambda entry: entry > 0 and entry % 2 != READ_ONLY):
        stop = start + len(list(run))
        yield start, stop, writable
        start = stop


def _runs(mask: Mask) -> Iterator[tuple[int, int]]:
    """The maximal [start, stop) in which all are true."""
    if mask.all():
        yield 0, len(mask)
        return
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
