"""The disk tier: pages by key in checksummed files of one directory, which a kill at any instant leaves readable.

It knows keys and bytes: no tokens, sessions, tensors or devices. A fault of the disk never raises: writing ends with
a state and a reason, and what cannot be read is a miss that is counted and logged.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType

from kvstore.disk.directory import Manifest, TierDirectory, UnreadableManifest, read_manifest
from kvstore.disk.errors import DirectoryUnusable
from kvstore.disk.files import FileCalls
from kvstore.disk.records import KEY_BYTES, Payload, Reason
from kvstore.disk.segments import Flaw, Record, Segment
from kvstore.disk.store import SegmentStore, Sizes

logger = logging.getLogger(__name__)


class TierState(StrEnum):
    """What the tier still does."""

    OPEN = "open"
    READ_ONLY = "read_only"  # the disk refused a write; reading goes on
    CLOSED = "closed"


@dataclass(frozen=True)
class DiskStats:
    """Counts since the tier was opened, and sizes now; `file_bytes` is at most `budget_bytes`."""

    state: TierState
    fault: str | None  # why it is read_only
    records: int
    live_bytes: int  # of the files, by records that can be read
    file_bytes: int
    budget_bytes: int
    segments: int
    evicted: int  # records forgotten to make room
    evicted_bytes: int  # of their payloads
    moved_bytes: int  # copied forward to make room
    rejected: Mapping[str, int]  # by reason: files and records that are misses


@dataclass(frozen=True)
class BadPlace:
    """A file, or a record of it, that is not what was written."""

    path: Path
    reason: Reason
    detail: str
    key: bytes | None = None
    offset: int = 0


@dataclass(frozen=True)
class Verification:
    """What reading everything found."""

    records: int
    bad: Sequence[BadPlace]


class DiskTier:
    """At most `budget_bytes` of files in `directory`, which belongs to this object until `close`.

    A record is 1 to `page_bytes` bytes under a key of 32 bytes that stands for exactly these bytes: a key is stored
    once. Records written under another `fingerprint` or page size, or by another version of this program, are misses
    and go first when room is needed. When the budget is full the least recently used records go; after a restart the
    order is that of writing, and records that were dropped may be back.

    Threads: `put`, `compact` and `close` belong to one thread; everything else may be called from any thread at any
    time. What reads holds a lock for dictionary operations only. Every call may wait for the disk, save `contains`,
    `was_evicted`, `touch`, `keys`, `stats` and `drop`.

    `was_foreign` says whether the records were another fingerprint's before.

    Raises DirectoryInUse when another process has the directory, DirectoryUnusable when the system refuses it, and
    ValueError when the budget holds fewer than four files of one page.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        budget_bytes: int,
        fingerprint: bytes,
        page_bytes: int,
        calls: FileCalls | None = None,
    ) -> None:
        manifest = Manifest(fingerprint, page_bytes, budget_bytes)
        sizes = Sizes(budget_bytes, page_bytes)
        calls = calls or FileCalls()
        self.path = Path(directory)
        self.budget_bytes = budget_bytes
        self.fingerprint = fingerprint
        self.page_bytes = page_bytes
        self._state = TierState.OPEN
        self._fault: str | None = None
        self._flaws = _FlawLog()
        self._writing = threading.Lock()  # files are changed by one at a time
        self._directory = TierDirectory(self.path, calls)
        try:
            self.was_foreign = _adopt(self._directory, manifest)
            self._store = SegmentStore(self._directory, sizes, manifest.identity, calls, self._flaws.note)
        except OSError as error:
            self._directory.close()
            raise DirectoryUnusable(self.path, error.strerror or str(error)) from error

    def __enter__(self) -> DiskTier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._store.index)

    @property
    def state(self) -> TierState:
        """What the tier still does."""
        return self._state

    @property
    def fault(self) -> str | None:
        """Why writing ended, None while it did not."""
        return self._fault

    def put(self, batch: Iterable[tuple[bytes, Payload]]) -> int:
        """Store records; those stored are durable on return. Known keys count as used, and are not written again.

        Payloads are C-contiguous bytes, read in place. Returns how many of the batch's entries are stored now: fewer
        than all when the tier is not open any more, or when the batch alone is more than the budget holds. Raises
        ValueError for a key that is not 32 bytes or a payload that is empty or longer than a page, and stores nothing.
        """
        records = [(key, self._checked(key, payload)) for key, payload in batch]
        with self._writing:
            if self._state is TierState.OPEN:
                self._write({key: payload for key, payload in records if self._store.index.use(key) is None})
        return sum(key in self._store.index for key, _ in records)

    def read(self, key: bytes, buffer: bytearray | memoryview) -> int | Reason | None:
        """Fill the beginning of `buffer` with the key's record, verified, and return its length in bytes.

        Else None when there is no record, or why there is none that can be read (then it is dropped); the buffer's
        content is undefined after that. The record counts as used. Raises ValueError when the buffer is shorter than
        the record.
        """
        view = memoryview(buffer).cast("B")
        while self._state is not TierState.CLOSED and (record := self._store.index.use(key)) is not None:
            if len(view) < record.length:
                raise ValueError(f"buffer of {len(view)} bytes: the record has {record.length}")
            flaw = self._store.read(record, view)
            if flaw is None:
                return record.length
            if self._store.discard(record, flaw):  # else it was moved while we read: then look again
                return flaw.reason
        return None

    def contains(self, key: bytes) -> bool:
        """Whether there is a record; it has not been read yet, so it may still turn out to be a miss."""
        return key in self._store.index

    def was_evicted(self, key: bytes) -> bool:
        """Whether a record was forgotten to make room since the tier was opened; the last ones are remembered."""
        return self._store.was_evicted(key)

    def touch(self, key: bytes) -> bool:
        """Count the key as used now; whether there is a record."""
        return self._store.index.use(key) is not None

    def keys(self) -> list[bytes]:
        """All keys, least recently used first."""
        return [record.key for record in self._store.index.records()]

    def drop(self, keys: Iterable[bytes]) -> int:
        """Forget records; how many there were. Their bytes go with their file, which may be after a restart."""
        return self._store.index.drop(keys)

    def erase(self, keys: Set[bytes]) -> int:
        """Forget records and overwrite them, so that no restart brings them back; how many there were.

        May be called from any thread: it waits for `put`.
        """
        num_dropped = self._store.index.drop(keys)
        with self._writing:
            if self._state is TierState.OPEN:
                try:
                    self._store.erase(keys)
                except OSError as error:
                    self._switch_off(error)
        return num_dropped

    def stats(self) -> DiskStats:
        """Counts and sizes."""
        store = self._store
        return DiskStats(
            state=self._state,
            fault=self._fault,
            records=len(store.index),
            live_bytes=store.index.live_bytes,
            file_bytes=store.file_bytes,
            budget_bytes=self.budget_bytes,
            segments=len(store.segments),
            evicted=store.evicted,
            evicted_bytes=store.evicted_bytes,
            moved_bytes=store.moved_bytes,
            rejected=self._flaws.counts(),
        )

    def verify(self) -> Verification:
        """Read every record. Those that are bad are dropped; what a killed process left behind the last is not bad."""
        payload = memoryview(bytearray(self.page_bytes))
        records = self._store.index.records()
        bad = [*self._bad_files(), *filter(None, (self._bad_record(record, payload) for record in records))]
        return Verification(len(records), bad)

    def compact(self) -> int:
        """Copy what is wanted out of the files that hold much else, and delete them; returns the bytes freed."""
        before = self._store.file_bytes
        with self._writing:
            if self._state is TierState.OPEN:
                try:
                    self._store.compact()
                except OSError as error:
                    self._switch_off(error)
        return before - self._store.file_bytes

    def close(self) -> None:
        """Let another process have the directory. Harmless when closed; reads that are under way end well."""
        if self._state is not TierState.CLOSED:
            self._state = TierState.CLOSED
            self._store.close()
            self._directory.close()

    def _checked(self, key: bytes, payload: Payload) -> memoryview:
        view = memoryview(payload).cast("B")
        if len(key) != KEY_BYTES:
            raise ValueError(f"key of {len(key)} bytes: must be {KEY_BYTES}")
        if not 1 <= len(view) <= self.page_bytes:
            raise ValueError(f"payload of {len(view)} bytes: must be 1 to {self.page_bytes}")
        return view

    def _write(self, records: Mapping[bytes, memoryview]) -> None:
        try:
            self._store.write(records.items())
        except OSError as error:
            self._switch_off(error)

    def _switch_off(self, error: OSError) -> None:
        self._state = TierState.READ_ONLY
        self._fault = str(error)
        self._store.abandon()
        logger.warning("nothing more is written to the page cache %s: %s", self.path, error)

    def _bad_files(self) -> list[BadPlace]:
        segments = self._store.segments
        return [
            BadPlace(segment.path, segment.flaw.reason, segment.flaw.detail)
            for segment in segments
            if segment.flaw is not None and not _is_harmless(segment, segment.flaw, segments[-1])
        ]

    def _bad_record(self, record: Record, payload: memoryview) -> BadPlace | None:
        flaw = self._store.read(record, payload)
        if flaw is None or not self._store.discard(record, flaw):
            return None
        return BadPlace(record.segment.path, flaw.reason, flaw.detail, record.key, record.offset)


def open_existing(directory: Path | str) -> DiskTier:
    """Open a directory as it was opened last. Raises DirectoryUnusable when its manifest does not say how."""
    manifest = read_manifest(Path(directory))
    if isinstance(manifest, UnreadableManifest):
        raise DirectoryUnusable(Path(directory), manifest.reason)
    return DiskTier(
        directory,
        budget_bytes=manifest.budget_bytes,
        fingerprint=manifest.fingerprint,
        page_bytes=manifest.page_bytes,
    )


def _adopt(directory: TierDirectory, manifest: Manifest) -> bool:
    """Note in the directory what it is open for from now on, and say when that is something else than before."""
    before = directory.manifest()
    is_foreign = isinstance(before, Manifest) and before.identity != manifest.identity
    if isinstance(before, UnreadableManifest):
        if directory.segment_numbers():
            logger.warning("page cache %s: %s; its files are judged one by one", directory.path, before.reason)
    elif is_foreign:
        logger.warning("page cache %s holds pages of another model or layout: they go to make room", directory.path)
    if before != manifest:
        directory.write_manifest(manifest)
    return is_foreign


def _is_harmless(segment: Segment, flaw: Flaw, newest: Segment) -> bool:
    """Whether the file is as a change of models, or a kill while it was begun or written, leaves it."""
    was_cut = flaw.reason is Reason.TORN and (segment is newest or not segment.usable)
    return was_cut or flaw.reason in (Reason.FOREIGN, Reason.FORMAT)


class _FlawLog:
    """Counts what is wrong by reason, and logs the first of each; from any thread."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def counts(self) -> Mapping[str, int]:
        """How many of each reason."""
        with self._lock:
            return dict(self._counts)

    def note(self, place: str, flaw: Flaw) -> None:
        """Something in `place` is not what was written, and is a miss."""
        with self._lock:
            self._counts[flaw.reason] += 1
            is_first = self._counts[flaw.reason] == 1
        more = "; more of this kind are only counted" if is_first else ""
        logger.log(
            logging.WARNING if is_first else logging.DEBUG, "%s: %s (%s)%s", place, flaw.reason, flaw.detail, more
        )
