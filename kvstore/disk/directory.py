"""The directory of a disk tier: private, locked, and with a manifest that says what it was last opened for.

Each segment file carries its own version and identity, so a lost or damaged manifest loses nothing; it lets a person,
and a program that knows no model, open the directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from zlib_ng import zlib_ng

from kvstore.disk.errors import DirectoryInUse, DirectoryUnusable
from kvstore.disk.files import FileCalls
from kvstore.disk.records import FORMAT_VERSION

MANIFEST_NAME = "manifest.json"
LOCK_NAME = "lock"
OVERHEAD_BYTES = 4096  # of the budget: the manifest, twice while it is replaced, and the lock

_SEGMENT_NAME = re.compile(r"(\d{8,19})\.seg")


@dataclass(frozen=True)
class Manifest:
    """What a directory was last opened for. Raises ValueError for an empty or very long fingerprint."""

    fingerprint: bytes
    page_bytes: int
    budget_bytes: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.fingerprint) <= 512:
            raise ValueError(f"fingerprint has {len(self.fingerprint)} bytes: give 1 to 512, a hash of what you have")

    @property
    def identity(self) -> bytes:
        """32 bytes that differ where records cannot be used for each other."""
        return hashlib.sha256(b"%d:" % self.page_bytes + self.fingerprint).digest()

    def pack(self) -> bytes:
        """The manifest as a file."""
        fields = {"format": FORMAT_VERSION, **asdict(self), "fingerprint": self.fingerprint.hex()}
        return json.dumps({**fields, "checksum": _checksum(fields)}, indent=1).encode() + b"\n"


@dataclass(frozen=True)
class UnreadableManifest:
    """A manifest that is missing, damaged or of another version, and which of these."""

    reason: str


def parse_manifest(data: bytes) -> Manifest | UnreadableManifest:
    """The manifest in a file's bytes."""
    try:
        fields = dict(json.loads(data))
        version, checksum = fields["format"], fields.pop("checksum", None)
        if version != FORMAT_VERSION:
            return UnreadableManifest(f"it is of format {version}, this program reads format {FORMAT_VERSION}")
        if checksum != _checksum(fields):
            return UnreadableManifest("its manifest is damaged")
        return Manifest(bytes.fromhex(fields["fingerprint"]), fields["page_bytes"], fields["budget_bytes"])
    except (ValueError, TypeError, KeyError):
        return UnreadableManifest("its manifest is damaged")


class DirectoryLock:
    """Held by one process at a time; the kernel takes it back however the process ends."""

    def __init__(self, directory: Path) -> None:
        """Take the lock. Raises DirectoryInUse, and OSError."""
        self._fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)  # for the other's message only
        except BlockingIOError:
            owner = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
            os.close(self._fd)
            raise DirectoryInUse(directory, owner or "?") from None
        except OSError:
            os.close(self._fd)
            raise

    def release(self) -> None:
        """Let another process have the directory; once."""
        os.close(self._fd)


class TierDirectory:
    """A directory of mode 0700 whose files belong to this process until `close`."""

    def __init__(self, path: Path, calls: FileCalls) -> None:
        """Make the directory and lock it. Raises DirectoryInUse and DirectoryUnusable."""
        self.path = path
        self._calls = calls
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
            self._lock = DirectoryLock(path)
        except OSError as error:
            raise DirectoryUnusable(path, error.strerror or str(error)) from error

    def manifest(self) -> Manifest | UnreadableManifest:
        """What the directory was last opened for."""
        return read_manifest(self.path)

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest in one step: after a kill there is the old one or the new one."""
        draft = self.path / f"{MANIFEST_NAME}.new"
        self._calls.remove(draft)
        fd = self._calls.create(draft)
        try:
            self._calls.write(fd, [manifest.pack()], 0)
            self._calls.sync(fd)
        finally:
            os.close(fd)
        self._calls.replace(draft, self.path / MANIFEST_NAME)
        self._calls.sync_directory(self.path)

    def segment_path(self, number: int) -> Path:
        """Where segment `number` lies."""
        return self.path / f"{number:08d}.seg"

    def segment_numbers(self) -> list[int]:
        """Numbers of the segment files, in the order they were begun."""
        matches = map(_SEGMENT_NAME.fullmatch, os.listdir(self.path))
        return sorted(int(match[1]) for match in matches if match)

    def close(self) -> None:
        """Let another process have the directory; once."""
        self._lock.release()


def read_manifest(directory: Path) -> Manifest | UnreadableManifest:
    """The manifest in a directory that may be none; touches nothing."""
    try:
        return parse_manifest((directory / MANIFEST_NAME).read_bytes())
    except FileNotFoundError:
        return UnreadableManifest("it has no manifest; name a directory that a server has used")
    except OSError as error:
        return UnreadableManifest(f"its manifest cannot be read: {error.strerror}")


def _checksum(fields: dict[str, object]) -> int:
    return zlib_ng.crc32(json.dumps(fields, sort_keys=True).encode())
