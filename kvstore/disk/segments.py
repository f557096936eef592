"""Segment files: opening one without reading payloads, reading a record, and appending to the newest.

A record counts only once `SegmentWriter.sync` returned it. It knows no budget, and not which records are wanted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path

from zlib_ng import zlib_ng

from kvstore.disk.files import FileCalls
from kvstore.disk.records import (
    ERASED_KEY,
    FOOTER_MAGIC,
    HEADER_BYTES,
    TRAILER_BYTES,
    FooterEntry,
    Payload,
    Reason,
    RecordHeader,
    check_segment_header,
    footer_bytes,
    footer_bytes_by_trailer,
    listed_bytes,
    pack_footer,
    pack_record_header,
    pack_segment_header,
    padding_bytes,
    parse_footer,
    parse_record_header,
    record_bytes,
    records_end,
)


@dataclass(frozen=True)
class Flaw:
    """What is wrong in a file, and in words."""

    reason: Reason
    detail: str


@dataclass(eq=False)
class Segment:
    """One file: records in [HEADER_BYTES, end), then a footer, a torn tail or nothing.

    `records` are what it holds, wanted or not, less what its footer says is not wanted; `live_bytes` is what those of
    them take that the index has.
    """

    path: Path
    number: int
    end: int = HEADER_BYTES
    file_bytes: int = 0
    sealed: bool = False
    usable: bool = True
    flaw: Flaw | None = None
    records: list[Record] = field(default_factory=list)
    live_bytes: int = 0

    @property
    def is_open(self) -> bool:
        """Whether records can still be appended, if it is the newest."""
        return self.usable and not self.sealed

    @property
    def full_bytes(self) -> int:
        """Size of the file if it were sealed now."""
        return self.end + footer_bytes(len(self.records))


@dataclass(frozen=True, eq=False, slots=True)
class Record:
    """Where a payload of `length` bytes lies: behind the header at `offset`."""

    key: bytes
    segment: Segment
    offset: int
    length: int

    @property
    def size(self) -> int:
        """Bytes of the file it takes, with its line in the footer."""
        return listed_bytes(self.length)


def load_segment(calls: FileCalls, path: Path, number: int, identity: bytes) -> Segment:
    """A segment as its file is, with its flaw if it has one; a segment without usable records is still a file."""
    segment = Segment(path, number)
    try:
        fd = calls.open_to_read(path)
        try:
            _load(calls, fd, segment, identity)
        finally:
            os.close(fd)
    except OSError as error:
        segment.file_bytes = segment.file_bytes or _size_of(path)
        _reject(segment, Reason.READ_ERROR, str(error))
    return segment


def read_record(calls: FileCalls, record: Record, header: bytearray, payload: memoryview) -> Flaw | None:
    """Fill `header` and the first `record.length` bytes of `payload`, straight from the file, and check both."""
    try:
        fd = calls.open_to_read(record.segment.path)  # opened by name: no bound on segments, and deleting needs no wait
        try:
            num_read = calls.read(fd, [header, payload[: record.length]], record.offset)
        finally:
            os.close(fd)
    except OSError as error:
        return Flaw(Reason.READ_ERROR, str(error))
    return _check(record, parse_record_header(header), payload[: record.length], num_read)


def erase_records(calls: FileCalls, segment: Segment, is_doomed: Callable[[Record], bool]) -> None:
    """Overwrite records with zeros and take their names out of the file; it is durable when this returns."""
    doomed = {record.offset: record for record in segment.records if is_doomed(record)}
    if not doomed:
        return
    fd = calls.open_to_write(segment.path)
    try:
        for record in doomed.values():
            zeros = bytes(record.length)
            calls.write(fd, [pack_record_header(ERASED_KEY, zeros), zeros], record.offset)
        if segment.sealed:
            _erase_in_footer(calls, fd, segment.file_bytes, doomed)
        calls.sync(fd)
    finally:
        os.close(fd)
    blank = {offset: Record(ERASED_KEY, segment, offset, record.length) for offset, record in doomed.items()}
    segment.records = [blank.get(record.offset, record) for record in segment.records]


def _erase_in_footer(calls: FileCalls, fd: int, file_bytes: int, doomed: Container[int]) -> None:
    """Where a kill leaves this half done, the records' own headers are read instead."""
    entries, offset = [], HEADER_BYTES
    for entry in _read_footer(calls, fd, file_bytes) or []:
        entries.append(FooterEntry(ERASED_KEY, entry.length, is_wanted=False) if offset in doomed else entry)
        offset += record_bytes(entry.length)
    if entries:
        footer = pack_footer(entries)
        calls.write(fd, [footer], file_bytes - len(footer))


class SegmentWriter:
    """Appends records to one segment. After an OSError only `abandon` may be called."""

    def __init__(self, calls: FileCalls, segment: Segment, fd: int) -> None:
        self.segment = segment
        self._calls = calls
        self._fd = fd
        self._end = segment.end
        self._pending: list[Record] = []

    @classmethod
    def create(cls, calls: FileCalls, path: Path, number: int, identity: bytes) -> SegmentWriter:
        """Begin a new file; its name is durable when this returns."""
        segment = Segment(path, number, file_bytes=HEADER_BYTES)
        writer = cls(calls, segment, calls.create(path))
        try:
            calls.write(writer._fd, [pack_segment_header(number, identity)], 0)
            calls.sync(writer._fd)
            calls.sync_directory(path.parent)
        except OSError:
            writer.abandon()
            raise
        return writer

    @classmethod
    def resume(cls, calls: FileCalls, segment: Segment) -> SegmentWriter:
        """Go on behind the last good record; what a killed process left there is cut off."""
        writer = cls(calls, segment, calls.open_to_write(segment.path))
        try:
            calls.truncate(writer._fd, segment.end)
        except OSError:
            writer.abandon()
            raise
        segment.file_bytes, segment.flaw = segment.end, None
        return writer

    @property
    def full_bytes(self) -> int:
        """Size of the file if it were sealed now."""
        return self._end + footer_bytes(len(self.segment.records) + len(self._pending))

    def append(self, key: bytes, payload: Payload) -> None:
        """Write a record."""
        self.append_packed(key, pack_record_header(key, payload), payload)

    def append_packed(self, key: bytes, header: Payload, payload: Payload) -> None:
        """Write a record whose header is made already."""
        length = len(payload)
        self._calls.write(self._fd, [header, payload, bytes(padding_bytes(length))], self._end)
        self._pending.append(Record(key, self.segment, self._end, length))
        self._end += record_bytes(length)
        self.segment.file_bytes = self._end

    def sync(self) -> list[Record]:
        """Make what was appended durable, and return it."""
        if not self._pending:
            return []
        self._calls.sync(self._fd)
        durable, self._pending = self._pending, []
        self.segment.records += durable
        self.segment.end = self._end
        return durable

    def seal(self, is_wanted: Callable[[Record], bool]) -> None:
        """Write the footer behind the records, all durable by now, and close the file.

        Whatever a footer lists was therefore written whole; what is found without one may not have been.
        """
        assert not self._pending
        entries = [FooterEntry(record.key, record.length, is_wanted(record)) for record in self.segment.records]
        footer = pack_footer(entries)
        self._calls.write(self._fd, [footer], self._end)
        self._calls.sync(self._fd)
        self.segment.file_bytes = self._end + len(footer)
        self.segment.sealed = True
        self.close()

    def close(self) -> None:
        """Close the file as it is; appended records that were not made durable may be there or not."""
        os.close(self._fd)

    def abandon(self) -> None:
        """Cut off what is not durable, as far as the system still lets us, and close the file."""
        with contextlib.suppress(OSError):
            self._calls.truncate(self._fd, self.segment.end)
            self.segment.file_bytes = self.segment.end
        self.close()


def _load(calls: FileCalls, fd: int, segment: Segment, identity: bytes) -> None:
    segment.file_bytes = calls.size(fd)
    reason = check_segment_header(_read(calls, fd, HEADER_BYTES, 0), segment.number, identity)
    if reason is not None:
        _reject(segment, reason, "none of its records can be used")
        return
    footer = _read_footer(calls, fd, segment.file_bytes)
    if footer is not None:
        segment.sealed = True
        for entry in footer:
            _add(segment, entry.key, entry.length, is_wanted=entry.is_wanted)
    else:
        _scan(calls, fd, segment)


def _read_footer(calls: FileCalls, fd: int, file_bytes: int) -> list[FooterEntry] | None:
    """What the footer lists, None when there is none that is whole."""
    num_bytes = footer_bytes_by_trailer(_read(calls, fd, TRAILER_BYTES, max(0, file_bytes - TRAILER_BYTES)))
    if num_bytes is None or num_bytes > file_bytes - HEADER_BYTES:
        return None
    entries = parse_footer(_read(calls, fd, num_bytes, file_bytes - num_bytes))
    if entries is None or records_end(entry.length for entry in entries) != file_bytes - num_bytes:
        return None
    return entries


def _scan(calls: FileCalls, fd: int, segment: Segment) -> None:
    """Find the records by their headers, up to the first that is not whole."""
    while segment.end < segment.file_bytes:
        data = _read(calls, fd, HEADER_BYTES, segment.end)
        header = parse_record_header(data)
        if header is None or segment.end + record_bytes(header.length) > segment.file_bytes:
            segment.flaw = Flaw(_reason_of_end(data, header), f"read up to byte {segment.end}")
            return
        _add(segment, header.key, header.length, is_wanted=True)


def _reason_of_end(data: bytes, header: RecordHeader | None) -> Reason:
    """Why a segment's records end before its file does."""
    if data.startswith(FOOTER_MAGIC):
        return Reason.FOOTER
    is_torn = header is not None or len(data) < HEADER_BYTES or not any(data)
    return Reason.TORN if is_torn else Reason.RECORD_HEADER


def _add(segment: Segment, key: bytes, length: int, *, is_wanted: bool) -> None:
    if is_wanted:
        segment.records.append(Record(key, segment, segment.end, length))
    segment.end += record_bytes(length)


def _reject(segment: Segment, reason: Reason, detail: str) -> None:
    segment.records.clear()
    segment.usable = False
    segment.flaw = Flaw(reason, detail)


def _check(record: Record, header: RecordHeader | None, payload: memoryview, num_read: int) -> Flaw | None:
    if header is None or (header.key, header.length) != (record.key, record.length):
        return Flaw(Reason.RECORD_HEADER, "the record's header is damaged")
    if num_read != HEADER_BYTES + record.length or zlib_ng.crc32(payload) != header.checksum:
        return Flaw(Reason.CHECKSUM, "the payload is not what was written")
    return None


def _read(calls: FileCalls, fd: int, num_bytes: int, offset: int) -> bytes:
    """Up to `num_bytes` bytes, fewer at the end of the file."""
    data = bytearray(num_bytes)
    return bytes(data[: calls.read(fd, [data], offset)])


def _size_of(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
