"""Which record holds which key, in the order of last use. It does no I/O.

The one lock of the disk tier is here; it is held for a few dictionary operations, never while a file is touched.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

from kvstore.disk.segments import Record, Segment


class RecordIndex:
    """The records that can be read, least recently used first. Safe to call from any thread."""

    def __init__(self) -> None:
        self._records: OrderedDict[bytes, Record] = OrderedDict()
        self._live_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: bytes) -> bool:
        return key in self._records

    @property
    def live_bytes(self) -> int:
        """Bytes of files that the records take."""
        return self._live_bytes

    def records(self) -> list[Record]:
        """All records, least recently used first."""
        with self._lock:
            return list(self._records.values())

    def use(self, key: bytes) -> Record | None:
        """The key's record, which becomes the most recently used."""
        with self._lock:
            record = self._records.get(key)
            if record is not None:
                self._records.move_to_end(key)
            return record

    def add(self, records: Iterable[Record]) -> None:
        """Durable records, most recently used from now on; they take the place of others with their keys."""
        with self._lock:
            for record in records:
                self._forget(record.key)
                self._put(record)

    def add_unsure(self, records: Iterable[Record]) -> None:
        """As `add`, for records that may not be whole, copies under way when the power went: they take no place."""
        self.add([record for record in records if record.key not in self._records])

    def move(self, old: Record, new: Record) -> None:
        """A durable copy of `old` is `new`; its rank stays. Nothing happens when `old` is no longer in the index."""
        with self._lock:
            if self._records.get(old.key) is old:
                old.segment.live_bytes -= old.size
                self._live_bytes -= old.size
                self._put(new)

    def holds(self, record: Record) -> bool:
        """Whether this record is the one of its key."""
        return self._records.get(record.key) is record

    def discard(self, record: Record) -> bool:
        """Forget this record; whether the index had it, and not a copy of it or nothing."""
        with self._lock:
            held = self._records.get(record.key) is record
            if held:
                self._forget(record.key)
            return held

    def drop(self, keys: Iterable[bytes]) -> int:
        """Forget keys; how many there were."""
        with self._lock:
            return sum(self._forget(key) is not None for key in keys)

    def pop_oldest(self) -> Record | None:
        """Forget the least recently used record; None when there is none."""
        with self._lock:
            return self._forgotten(self._records.popitem(last=False)[1]) if self._records else None

    def live_in(self, segment: Segment) -> list[Record]:
        """The segment's records that are in the index, in the order of its file."""
        with self._lock:
            return [record for record in segment.records if self._records.get(record.key) is record]

    def _put(self, record: Record) -> None:
        self._records[record.key] = record
        record.segment.live_bytes += record.size
        self._live_bytes += record.size

    def _forget(self, key: bytes) -> Record | None:
        record = self._records.pop(key, None)
        return None if record is None else self._forgotten(record)

    def _forgotten(self, record: Record) -> Record:
        record.segment.live_bytes -= record.size
        self._live_bytes -= record.size
        return record
