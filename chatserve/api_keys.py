"""API keys: which tenant each one opens and what that tenant may use. Keys are hashed as they are read, and stay so.

A keys file has one a line: `NAME=KEY`, or `NAME=sha256:HEX` where the key itself shall not be written down, then limits
for this one, as in `alice=a-long-secret turns=4 tokens_per_minute=20000`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

HASH_PREFIX = "sha256:"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_KEY = re.compile(r"[!-~]{8,512}")
_HASH = re.compile(r"[0-9a-fA-F]{64}")
_NUMBER = re.compile(r"[1-9][0-9]{0,11}")


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What one tenant may use: sessions in all, turns at a time, tokens computed a minute. None is no limit.

    Among histories as likely to be wanted, those of a higher `priority` are kept; None is 0.
    """

    sessions: int | None = None
    turns: int | None = None
    tokens_per_minute: int | None = None
    priority: int | None = None

    def over(self, defaults: TenantLimits) -> TenantLimits:
        """These limits, and the defaults for what they leave open."""
        open_fields = {entry.name for entry in fields(self) if getattr(self, entry.name) is None}
        return replace(self, **{name: getattr(defaults, name) for name in open_fields})


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The SHA-256 of one key, and the tenant whose sessions it opens."""

    tenant: str
    digest: bytes = field(repr=False)
    limits: TenantLimits = TenantLimits()


def hash_key(key: str) -> bytes:
    """What is kept of a key. Keys are long random words: a fast hash is enough, and none is worth guessing."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def parse_api_key(text: str) -> ApiKey:
    """`NAME=KEY` or `KEY`; a key without a name gets a tenant named by its hash. Raises ValueError."""
    name, equals, key = text.partition("=")
    if not (equals and key.strip("=") and _NAME.fullmatch(name)):  # base64 keys end in "=": no name there
        name, key = "", text
    digest = _digest_of(key)
    return ApiKey(name or f"key-{digest.hex()[:16]}", digest)


def _digest_of(key: str) -> bytes:
    if key.startswith(HASH_PREFIX):
        if not _HASH.fullmatch(key.removeprefix(HASH_PREFIX)):
            raise ValueError("a hashed API key is sha256: and 64 hexadecimal digits, as `sha256sum` prints them")
        return bytes.fromhex(key.removeprefix(HASH_PREFIX))
    if not _KEY.fullmatch(key):
        raise ValueError("an API key needs 8 to 512 printable characters without spaces, written KEY or NAME=KEY")
    return hash_key(key)


def read_keys_file(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file. Raises ValueError that names the line, never what stands in it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the keys file {path} cannot be read: {error}") from None
    keys = tuple(_keys_in(path, lines))
    if not keys:
        raise ValueError(f"the keys file {path} has no keys; write NAME=KEY, one a line")
    return keys


def _keys_in(path: Path, lines: Iterable[str]) -> Iterator[ApiKey]:
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            yield replace(parse_api_key(words[0]), limits=_limits(words[1:]))
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from None


def _limits(words: Iterable[str]) -> TenantLimits:
    names = [entry.name for entry in fields(TenantLimits)]
    given = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in names or not _NUMBER.fullmatch(value):
            raise ValueError(f"behind a key stand limits, each as NAME=NUMBER; the names are {', '.join(names)}")
        given[name] = int(value)
    return TenantLimits(**given)


def check_distinct(keys: Iterable[ApiKey]) -> None:
    """Raise ValueError where two keys have one name, or two names one key."""
    listed = list(keys)
    for what, values in (("name", [key.tenant for key in listed]), ("key", [key.digest for key in listed])):
        if listed and max(Counter(values).values()) > 1:
            raise ValueError(f"the same {what} is given twice; give each tenant one name and one key")
