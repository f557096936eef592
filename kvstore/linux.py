"""The few Linux calls that mapped memory needs, through ctypes; each checked, none holding the interpreter lock.

It knows system calls and error numbers; it does not know pages.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore.errors import MemoryRefused

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 0x1, 0x2, 0x10, 0x20, 0x4000
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE = 0x1, 0x2
MAP_FAILED = ctypes.c_void_p(-1).value
DEFAULT_MAX_MAP_COUNT = 65_530


class LinuxCalls:
    """mmap, munmap and fallocate of the C library, raising MemoryRefused. Tests make its nth call fail."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._mmap, self._munmap, self._fallocate = libc.mmap, libc.munmap, libc.fallocate
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = [
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
        ]  # fmt: skip
        self._munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

    def reserve(self, num_bytes: int) -> int:
        """Address of `num_bytes` of address space without memory."""
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        return self._checked_mmap(f"mmap to reserve {num_bytes} bytes", None, num_bytes, PROT_NONE, flags, -1, 0)

    def hide(self, address: int, num_bytes: int) -> None:
        """Put inaccessible address space in the place of whatever is mapped there."""
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
        self._checked_mmap(f"mmap to unmap {num_bytes} bytes", address, num_bytes, PROT_NONE, flags, -1, 0)

    def map_file(self, address: int, num_bytes: int, file: int, offset: int, *, writable: bool) -> None:
        """Map part of a file at exactly `address`."""
        protection = PROT_READ | PROT_WRITE if writable else PROT_READ
        flags = MAP_SHARED | MAP_FIXED
        self._checked_mmap(f"mmap of {num_bytes} bytes", address, num_bytes, protection, flags, file, offset)

    def munmap(self, address: int, num_bytes: int) -> None:
        """Return address space."""
        if self._munmap(address, num_bytes) != 0:
            raise MemoryRefused("munmap", _reason())

    def allocate(self, file: int, offset: int, num_bytes: int) -> None:
        """Give a part of a file its memory now, as zeros, growing the file: running out is an error, not a SIGBUS."""
        self._checked_fallocate(f"fallocate of {num_bytes} bytes", file, 0, offset, num_bytes)

    def punch(self, file: int, offset: int, num_bytes: int) -> None:
        """Give a part of a file's memory back to the system."""
        mode = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
        self._checked_fallocate(f"fallocate to punch {num_bytes} bytes", file, mode, offset, num_bytes)

    def _checked_mmap(self, call: str, *arguments: int | None) -> int:
        address: int | None = self._mmap(*arguments)
        if address is None or address == MAP_FAILED:
            raise MemoryRefused(call, _reason())
        return address

    def _checked_fallocate(self, call: str, *arguments: int) -> None:
        while self._fallocate(*arguments) != 0:
            if ctypes.get_errno() != errno.EINTR:
                raise MemoryRefused(call, _reason())


def sparse_zeros(length: int) -> npt.NDArray[np.int64]:
    """An array whose untouched parts take no memory, nor any promise of it: arenas of terabytes have large tables."""
    memory = mmap.mmap(-1, length * 8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.int64)


def max_map_count() -> int:
    """How many mappings Linux allows one process."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except OSError:
        return DEFAULT_MAX_MAP_COUNT


def _reason() -> str:
    return os.strerror(ctypes.get_errno())
