"""The segment files under one budget: appending, beginning files, and making room by whole files.

When a file must go, the least recently used records are forgotten until some file holds little that is wanted; that
is copied to the newest file, and only when the copies are durable is the old file deleted. One thread writes; any
thread may read. Every method but `read` may raise OSError, after which only `read`, `abandon` and properties work.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from kvstore.disk.directory import OVERHEAD_BYTES, TierDirectory
from kvstore.disk.files import FileCalls
from kvstore.disk.index import RecordIndex
from kvstore.disk.records import ERASED_KEY, HEADER_BYTES, Payload, Reason, footer_bytes, listed_bytes
from kvstore.disk.segments import Flaw, Record, Segment, SegmentWriter, erase_records, load_segment, read_record

MAX_SEGMENT_BYTES = 256 << 20
MAX_EVICTED_KEYS = 50_000  # remembered, about 10 MB
MIN_SEGMENTS = 4  # one being written, one being moved, two that stay
SEGMENTS_PER_BUDGET = 16
# For sessions that return, 4/5 gives nearly the hits of exact LRU with little copying; 7/8 writes twice as much.
LIVE_SHARE = 4 / 5  # of all files: while more is live, records are forgotten until a file can go without copying
MOVED_SHARE = 3 / 4  # of a file: more is never copied, records are forgotten instead

EMPTY_BYTES = HEADER_BYTES + footer_bytes(0)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """How the budget is divided. Raises ValueError when it holds fewer than four files of one page."""

    budget_bytes: int
    page_bytes: int

    def __post_init__(self) -> None:
        if self.page_bytes < 1:
            raise ValueError(f"page_bytes={self.page_bytes}: must be positive")
        least = OVERHEAD_BYTES + MIN_SEGMENTS * self._segment_bytes(1)
        if self.budget_bytes < least:
            raise ValueError(f"budget_bytes={self.budget_bytes}: must be at least {least} for pages of this size")

    @property
    def segment_bytes(self) -> int:
        """The most that one file takes: whole pages, a sixteenth of the budget, at most 256 MiB; but one page."""
        wanted = min(MAX_SEGMENT_BYTES, self.budget_bytes // SEGMENTS_PER_BUDGET)
        return self._segment_bytes(max(1, wanted // listed_bytes(self.page_bytes)))

    @property
    def capacity_bytes(self) -> int:
        """What of it records can take, counted as `Record.size`."""
        return self.segment_bytes - EMPTY_BYTES

    @property
    def sealed_bytes(self) -> int:
        """The most that all files but the newest may take when that is begun."""
        return self.budget_bytes - OVERHEAD_BYTES - self.segment_bytes

    def _segment_bytes(self, num_pages: int) -> int:
        return EMPTY_BYTES + num_pages * listed_bytes(self.page_bytes)


class SegmentStore:
    """Keeps the files of a locked directory and the index of their records."""

    def __init__(
        self,
        directory: TierDirectory,
        sizes: Sizes,
        identity: bytes,
        calls: FileCalls,
        on_flaw: Callable[[str, Flaw], None],
    ) -> None:
        """Read what is there; `on_flaw` hears of each file or record that is not what was written."""
        self.index = RecordIndex()
        self.evicted = 0
        self._evicted_keys: OrderedDict[bytes, None] = OrderedDict()
        self.evicted_bytes = 0
        self.moved_bytes = 0
        self._directory = directory
        self._sizes = sizes
        self._identity = identity
        self._calls = calls
        self._on_flaw = on_flaw
        self._segments: dict[int, Segment] = {}
        self._writer: SegmentWriter | None = None
        self._next_number = 1
        self._load()

    @property
    def segments(self) -> list[Segment]:
        """The files, oldest first."""
        return list(self._segments.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of all segment files."""
        return sum(segment.file_bytes for segment in self.segments)

    def read(self, record: Record, payload: memoryview, header: bytearray | None = None) -> Flaw | None:
        """Fill the first `record.length` bytes; what they hold after a flaw is undefined."""
        return read_record(self._calls, record, header or bytearray(HEADER_BYTES), payload)

    def was_evicted(self, key: bytes) -> bool:
        """Whether the key's record was forgotten to make room, not long ago, and is not there again."""
        return key in self._evicted_keys and key not in self.index

    def write(self, records: Iterable[tuple[bytes, Payload]]) -> None:
        """Store records whose keys the index does not have, each key once; they are durable when this returns."""
        for key, payload in records:
            self._writer_for(listed_bytes(len(payload))).append(key, payload)
        if self._writer is not None:
            self.index.add(self._writer.sync())

    def compact(self) -> None:
        """Delete each file of which at least a quarter is not wanted, after copying the rest."""
        for segment in self.segments:
            is_sparse = segment.live_bytes <= segment.file_bytes * MOVED_SHARE
            is_there = segment.number in self._segments  # making room for another may have taken it
            if is_sparse and is_there and not (segment.is_open and segment is self.segments[-1]):
                self._compact(segment)

    def discard(self, record: Record, flaw: Flaw) -> bool:
        """Forget a record that could not be read; False when it was moved or forgotten meanwhile. From any thread."""
        held = self.index.discard(record)
        if held:
            self._on_flaw(f"record at byte {record.offset} of {record.segment.path}", flaw)
        return held

    def erase(self, keys: Container[bytes]) -> None:
        """Overwrite what the files hold under these keys, wanted or not; it is durable when this returns."""
        for segment in self.segments:
            erase_records(self._calls, segment, lambda record: record.key in keys)

    def abandon(self) -> None:
        """Give up writing; what was not durable is cut off where that is possible."""
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None

    def close(self) -> None:
        """Close the newest file; the next start goes on behind its last record."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _load(self) -> None:
        for number in self._directory.segment_numbers():
            path = self._directory.segment_path(number)
            segment = load_segment(self._calls, path, number, self._identity)
            self._segments[number] = segment
            self._next_number = number + 1
            add = self.index.add if segment.sealed else self.index.add_unsure
            add([record for record in segment.records if record.key != ERASED_KEY])
            if segment.flaw is not None:
                self._on_flaw(str(path), segment.flaw)
        self._trim(self._sizes.budget_bytes - OVERHEAD_BYTES, self.segments)

    def _trim(self, most_bytes: int, segments: list[Segment]) -> None:
        """Delete files until the rest fits, without copying: only a smaller budget, or damage, makes this necessary."""
        num_bytes = sum(segment.file_bytes for segment in segments)
        for segment in sorted(segments, key=lambda segment: segment.live_bytes > 0):
            if num_bytes <= most_bytes:
                return
            num_bytes -= segment.file_bytes
            self._forget(segment)
            self._delete(segment)

    def _writer_for(self, num_bytes: int) -> SegmentWriter:
        """The writer of a file with room for a record of this size."""
        writer = self._writer or self._begin()
        return writer if self._fits(num_bytes, writer) else self._begin()

    def _begin(self) -> SegmentWriter:
        """Seal the file being written, if there is one, and write to the next."""
        if self._writer is not None:
            self.index.add(self._writer.sync())
            self._writer.seal(self.index.holds)
            self._writer = None
        self._writer = self._resumed() or self._created()
        self._collect(self._writer)
        return self._writer

    def _fits(self, num_bytes: int, writer: SegmentWriter) -> bool:
        return writer.full_bytes + num_bytes <= self._sizes.segment_bytes

    def _resumed(self) -> SegmentWriter | None:
        """The writer of the newest file, when a process before this one left it with room."""
        segments = self.segments
        if not segments or not segments[-1].is_open:
            return None
        if segments[-1].full_bytes > self._sizes.segment_bytes:
            SegmentWriter.resume(self._calls, segments[-1]).close()  # only cuts off what was being written
            return None
        self._trim(self._sizes.sealed_bytes, segments[:-1])
        return SegmentWriter.resume(self._calls, segments[-1])

    def _created(self) -> SegmentWriter:
        """The writer of a new file, as large as a file may get."""
        self._trim(self._sizes.sealed_bytes, self.segments)
        number = self._next_number
        writer = SegmentWriter.create(self._calls, self._directory.segment_path(number), number, self._identity)
        self._next_number += 1
        self._segments[number] = writer.segment
        return writer

    def _collect(self, writer: SegmentWriter) -> None:
        """Delete files until the next one can be begun as soon as this one is full."""
        most_bytes = self._sizes.sealed_bytes - self._sizes.segment_bytes
        while self.file_bytes - writer.segment.file_bytes > most_bytes:
            room = self._sizes.segment_bytes - writer.full_bytes - listed_bytes(self._sizes.page_bytes)
            self._evacuate(self._choose(writer.segment, max(0, room)), writer)

    def _choose(self, newest: Segment, room: int) -> Segment:
        """The file with the least live data, once the oldest records are forgotten that make it too much to copy."""
        most_moved = min(room, self._sizes.capacity_bytes * MOVED_SHARE)
        much_live = self._sizes.sealed_bytes * LIVE_SHARE
        victim = min((segment for segment in self.segments if segment is not newest), key=_live_bytes)
        while victim.live_bytes > (0 if self.index.live_bytes > much_live else most_moved):
            oldest = self.index.pop_oldest()
            if oldest is None:
                break
            self._count_evicted(oldest)
            if oldest.segment is not newest:
                victim = min(victim, oldest.segment, key=_live_bytes)
        return victim

    def _evacuate(self, victim: Segment, writer: SegmentWriter) -> None:
        """Copy what is live in a file to the newest, and delete the file once the copies are durable."""
        moved = [record for record in self.index.live_in(victim) if self._copy(record, writer)]
        for old, new in zip(moved, writer.sync(), strict=True):
            self.index.move(old, new)
            self.moved_bytes += new.size
        self._delete(victim)

    def _copy(self, record: Record, writer: SegmentWriter) -> bool:
        """Append a record as it is; False when it cannot be read, which makes it a miss."""
        header, payload = bytearray(HEADER_BYTES), memoryview(bytearray(record.length))
        flaw = self.read(record, payload, header)
        if flaw is not None:
            self.discard(record, flaw)
            return False
        writer.append_packed(record.key, header, payload)
        return True

    def _compact(self, segment: Segment) -> None:
        if segment.live_bytes == 0:
            self._delete(segment)
        elif segment.live_bytes <= self._sizes.capacity_bytes:
            writer = self._writer_for(segment.live_bytes)
            if segment.number in self._segments and self._fits(segment.live_bytes, writer):
                self._evacuate(segment, writer)

    def _forget(self, segment: Segment) -> None:
        for record in self.index.live_in(segment):
            self.index.discard(record)
            self._count_evicted(record)

    def _count_evicted(self, record: Record) -> None:
        self.evicted += 1
        self.evicted_bytes += record.length
        self._evicted_keys[record.key] = None
        if len(self._evicted_keys) > MAX_EVICTED_KEYS:
            self._evicted_keys.popitem(last=False)

    def _delete(self, segment: Segment) -> None:
        """Remove a file nothing of which is wanted; its number is never used again, so readers find it or nothing."""
        if segment.flaw is not None and segment.flaw.reason in (Reason.FOREIGN, Reason.FORMAT):
            logger.info("removing %s to make room: %s", segment.path, segment.flaw.reason)
        self._calls.remove(segment.path)
        del self._segments[segment.number]


def _live_bytes(segment: Segment) -> int:
    return segment.live_bytes
