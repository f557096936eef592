"""The bytes of a segment file: its header, its records, and the footer that lists them once the file is full.

    segment header | record header, payload, zeros to 64 bytes | ... | footer, in full segments only

All integers are little-endian. Everything but the payload of a record carries its own checksum; the payload's stands in
its record's header. Checksums are zlib's CRC-32, from a library that computes them many times faster. It does no I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from zlib_ng import zlib_ng

FORMAT_VERSION = 1
KEY_BYTES = 32
HEADER_BYTES = 64  # of a segment and of a record
ALIGNMENT = 64  # a record's header never straddles a sector

SEGMENT_MAGIC = b"KVPAGES\0"
RECORD_MAGIC = b"KVPG"
FOOTER_MAGIC = b"KVFOOTER"

# The first two fields of a segment's header, magic and version, stay where they are in all versions.
_SEGMENT = struct.Struct("<8sIQ32s8xI")  # magic, version, number, identity, checksum of all before
_RECORD = struct.Struct("<4sII32sI12xI")  # magic, version, payload bytes, key, payload's checksum, header's checksum
_ENTRY = struct.Struct("<32sI")  # key, payload bytes with UNWANTED or without
_TRAILER = struct.Struct("<IIII")  # version, entries, zero, checksum of the footer before it
_CHECKSUM = struct.Struct("<I")

TRAILER_BYTES = _TRAILER.size
ERASED_KEY = bytes(KEY_BYTES)  # of a record that was overwritten: it only takes room
UNWANTED = 1 << 31  # no payload is so long

Payload = bytes | bytearray | memoryview


class Reason(StrEnum):
    """Why a record, or all records of a segment, are misses."""

    FOREIGN = "foreign"  # written for another model, layout or page size
    FORMAT = "format"  # written by another version of this program
    SEGMENT_HEADER = "segment_header"  # damaged, so the whole file is
    FOOTER = "footer"  # damaged; the records' own headers were read instead
    RECORD_HEADER = "record_header"  # damaged; without a footer all behind it is lost too
    TORN = "torn"  # the end of what was being written when the process was killed
    CHECKSUM = "checksum"  # the payload is not what was written
    READ_ERROR = "read_error"  # the system could not read it


@dataclass(frozen=True, slots=True)
class FooterEntry:
    """A record of a full segment; one that was not wanted any more when the footer was written only takes room."""

    key: bytes
    length: int
    is_wanted: bool


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What a record says of itself."""

    key: bytes
    length: int
    checksum: int


def record_bytes(length: int) -> int:
    """Bytes between a record with `length` bytes of payload and the next one."""
    return HEADER_BYTES + length + padding_bytes(length)


def listed_bytes(length: int) -> int:
    """Bytes of a full segment that such a record takes: its own, and its line in the footer."""
    return record_bytes(length) + _ENTRY.size


def padding_bytes(length: int) -> int:
    """Zeros behind a payload of `length` bytes."""
    return -length % ALIGNMENT


def footer_bytes(num_entries: int) -> int:
    """Size of the footer of a segment with so many records."""
    return len(FOOTER_MAGIC) + num_entries * _ENTRY.size + TRAILER_BYTES


def pack_segment_header(number: int, identity: bytes) -> bytes:
    """The first bytes of a segment file; `identity` (32 bytes) says whose records it can hold."""
    return _sealed(_SEGMENT.pack(SEGMENT_MAGIC, FORMAT_VERSION, number, identity, 0))


def check_segment_header(data: bytes, number: int, identity: bytes) -> Reason | None:
    """Why the file's records cannot be used, None when they can."""
    if len(data) != HEADER_BYTES or not any(data):
        return Reason.TORN
    if not data.startswith(SEGMENT_MAGIC):
        return Reason.SEGMENT_HEADER
    _, version, found_number, found_identity, _ = _SEGMENT.unpack(data)
    if version != FORMAT_VERSION:
        return Reason.FORMAT
    if not _is_intact(data) or found_number != number:
        return Reason.SEGMENT_HEADER
    return None if found_identity == identity else Reason.FOREIGN


def pack_record_header(key: bytes, payload: Payload) -> bytes:
    """The header to write before `payload`."""
    return _sealed(_RECORD.pack(RECORD_MAGIC, FORMAT_VERSION, len(payload), key, zlib_ng.crc32(payload), 0))


def parse_record_header(data: bytes | bytearray) -> RecordHeader | None:
    """What the header says, None when it is damaged, incomplete or none."""
    if len(data) != HEADER_BYTES or not data.startswith(RECORD_MAGIC) or not _is_intact(data):
        return None
    _, version, length, key, checksum, _ = _RECORD.unpack(data)
    return RecordHeader(key, length, checksum) if version == FORMAT_VERSION else None


def pack_footer(entries: Sequence[FooterEntry]) -> bytes:
    """The list of a full segment's records in the order of the file; their places follow from the lengths."""
    packed = (_ENTRY.pack(entry.key, entry.length | (0 if entry.is_wanted else UNWANTED)) for entry in entries)
    body = FOOTER_MAGIC + b"".join(packed)
    return _sealed(body + _TRAILER.pack(FORMAT_VERSION, len(entries), 0, 0))


def footer_bytes_by_trailer(trailer: bytes) -> int | None:
    """Size of the footer that ends in these bytes, None when they end none."""
    if len(trailer) != TRAILER_BYTES:
        return None
    version, num_entries, _, _ = _TRAILER.unpack(trailer)
    return footer_bytes(num_entries) if version == FORMAT_VERSION else None


def parse_footer(data: bytes) -> list[FooterEntry] | None:
    """The records that a footer lists, None when it is damaged."""
    if not data.startswith(FOOTER_MAGIC) or not _is_intact(data):
        return None
    entries = _ENTRY.iter_unpack(data[len(FOOTER_MAGIC) : -TRAILER_BYTES])
    return [FooterEntry(key, length & ~UNWANTED, not length & UNWANTED) for key, length in entries]


def records_end(lengths: Iterable[int]) -> int:
    """Where the records with these payload lengths end in a segment file."""
    return HEADER_BYTES + sum(map(record_bytes, lengths))


def _sealed(data: bytes) -> bytes:
    """The bytes with their last field, four bytes, replaced by the checksum of those before it."""
    body = data[: -_CHECKSUM.size]
    return body + _CHECKSUM.pack(zlib_ng.crc32(body))


def _is_intact(data: bytes | bytearray) -> bool:
    """Whether the last field is the checksum of the bytes before it."""
    return data[-_CHECKSUM.size :] == _CHECKSUM.pack(zlib_ng.crc32(data[: -_CHECKSUM.size]))
