"""Why a directory cannot be opened as a disk tier. Faults after that are states and counts, never exceptions."""

from __future__ import annotations

from pathlib import Path

from kvstore.errors import KVError


class DirectoryInUse(KVError):
    """Another process has the directory open; stop it or name another directory."""

    def __init__(self, directory: Path, owner: str) -> None:
        super().__init__(directory, owner)
        self.directory = directory
        self.owner = owner

    def __str__(self) -> str:
        return (
            f"the page cache {self.directory} is in use by the process with id {self.owner}; "
            "stop that one or choose another directory"
        )


class DirectoryUnusable(KVError):
    """The system refuses the directory, or it holds no store that this program can open by itself."""

    def __init__(self, directory: Path, reason: str) -> None:
        super().__init__(directory, reason)
        self.directory = directory
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot use {self.directory} as a page cache: {self.reason}"
