"""The data directory: private to its owner, and locked, so that two servers never write the same files.

A lock is the kernel's (`flock`): it ends with the last process that holds the open file, however that process ends.
The process id in the file is for the error message only.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from pathlib import Path

from chatserve.errors import StartupError

FORMAT = 1


class FileLock:
    """An exclusive lock on a file, made with mode 0600. A child process that inherits `fileno` holds it too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    @property
    def fileno(self) -> int:
        """The open file's descriptor. Raises `ValueError` while the lock is not held."""
        if self._fd is None:
            raise ValueError(f"{self._path} is not locked")
        return self._fd

    def acquire(self) -> bool:
        """Take the lock if nobody has it; whether it is held now."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        return True

    async def acquire_within(self, timeout_s: float, poll_s: float = 0.02) -> bool:
        """Take the lock, waiting for its holder to end; whether it is held now."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not self.acquire():
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(poll_s)
        return True

    def write_owner(self, pid: int) -> None:
        """Note who holds the lock."""
        os.ftruncate(self.fileno, 0)
        os.pwrite(self.fileno, b"%d\n" % pid, 0)

    def owner(self) -> str:
        """The process id noted last, or a question mark."""
        return self._path.read_text(errors="replace").strip() or "?"

    def release(self) -> None:
        """Close the file: the lock ends here, unless a child holds it too. Harmless when not held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class DataDirectory:
    """A directory of mode 0700 that one server holds from `open` to `close`.

    The file `format` says how its contents are to be read, so that an older server does not misread a newer one's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / "lock")
        self._format = path / "format"

    def open(self) -> None:
        """Make the directory if it is not there, lock it, and see that it is ours to read.

        Raises `StartupError` with the reason.
        """
        try:
            make_private(self.path)
            held = self._lock.acquire()
        except OSError as error:
            raise StartupError(f"cannot use the data directory {self.path}: {error}; choose another one") from error
        if not held:
            raise StartupError(
                f"the data directory {self.path} is in use by the server with process id {self._lock.owner()}; "
                "stop that one or choose another data directory"
            )
        self._lock.write_owner(os.getpid())
        try:
            self._check_format()
        except (StartupError, OSError):
            self.close()
            raise

    def _check_format(self) -> None:
        """Note the format where there is none yet; raise `StartupError` for one that this version does not know."""
        if not self._format.exists():
            write_durably(self._format, f"{FORMAT}\n")
            return
        noted = self._format.read_text(errors="replace").strip()
        if not noted.isdecimal() or int(noted) > FORMAT:
            raise StartupError(
                f"the data directory {self.path} has format {noted[:20]!r}, and this version knows formats up to "
                f"{FORMAT}: it was written by a newer chatserve; use that one, or choose another data directory"
            )

    def close(self) -> None:
        """Give the directory up."""
        self._lock.release()


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that after a crash it has all of the text or is not there."""
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def make_private(path: Path) -> None:
    """Make a directory with its parents, or take away everybody else's access to the one that is there."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)
