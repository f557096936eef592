"""The system calls on files that the disk tier makes, whole ones only; tests replace them to fail or to stop anywhere.

Every call may raise OSError. None holds the interpreter lock while the disk works.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kvstore.disk.records import Payload


class FileCalls:
    """Files of mode 0600 and their durable writing."""

    def create(self, path: Path) -> int:
        """A new, empty file's descriptor."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def open_to_write(self, path: Path) -> int:
        """An existing file's descriptor."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def open_to_read(self, path: Path) -> int:
        """An existing file's descriptor; what is read is not what lies next to it, so nothing is read ahead."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return fd

    def write(self, fd: int, buffers: Sequence[Payload], offset: int) -> None:
        """Write all of the buffers, one after another, without joining them."""
        rest = [memoryview(buffer) for buffer in buffers if len(buffer)]
        while rest:
            written = os.pwritev(fd, rest, offset)
            offset += written
            rest = _after(rest, written)

    def read(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        """Fill the buffers, one after another; returns the bytes read, fewer only at the end of the file."""
        rest, total = [memoryview(buffer) for buffer in buffers], 0
        while rest and (num_read := os.preadv(fd, rest, offset + total)):
            total += num_read
            rest = _after(rest, num_read)
        return total

    def size(self, fd: int) -> int:
        """Bytes of the file."""
        return os.fstat(fd).st_size

    def sync(self, fd: int) -> None:
        """Return when the file's bytes survive a power cut."""
        os.fdatasync(fd)

    def sync_directory(self, path: Path) -> None:
        """Return when the names in the directory survive a power cut."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def truncate(self, fd: int, num_bytes: int) -> None:
        """Cut the file."""
        os.ftruncate(fd, num_bytes)

    def replace(self, source: Path, target: Path) -> None:
        """Give a file the name of another, in one step."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Take the file's name away if it is there; who has it open goes on reading."""
        path.unlink(missing_ok=True)


def _after(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of the buffers without their first `num_bytes` bytes."""
    for index, buffer in enumerate(buffers):
        if num_bytes < len(buffer):
            return [buffer[num_bytes:], *buffers[index + 1 :]]
        num_bytes -= len(buffer)
    return []
