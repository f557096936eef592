"""Histories that are to leave every tier, not for want of room but because nobody may have them any more.

The device's index goes first, then host memory, then the disk; what is on its way between them is waited for, a little
at each tick. What others share is kept: whoever asks says how much that is, and what the index knows of it stays too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from kvstore.arrays import TokenArray
from kvstore.keys import PageKeys
from kvstore.layout import KVLayout
from kvstore.residency import Residency
from kvstore.tiers import Tiers

KEYS_A_TICK = 2048  # some 3 ms of hashing


@dataclass(slots=True)
class Doomed:
    """A history whose rows behind the first `num_kept` tokens must go, and the names they may have below."""

    salt: bytes
    tokens: TokenArray
    num_kept: int
    unnamed: Iterator[bytes]
    keys: set[bytes] = field(default_factory=set)


class Forgetter:
    """Takes histories out of the index and, where there are tiers below, out of those."""

    def __init__(self, layout: KVLayout, residency: Residency) -> None:
        self.tiers: Tiers | None = None
        self._layout = layout
        self._residency = residency
        self._doomed: deque[Doomed] = deque()
        self._erasing: list[Future[int]] = []
        self._disk_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvstore-erase")

    @property
    def is_busy(self) -> bool:
        """Whether something is still to be forgotten."""
        return bool(self._doomed or self._erasing)

    def forget(self, salt: bytes, tokens: TokenArray, num_kept: int) -> None:
        """Begin; without tiers below it is done when this returns, except for pages that somebody has leased."""
        self._residency.forget(salt, tokens, num_kept)
        if self.tiers is not None:
            names = names_of(self.tiers.keys, self._layout, salt, tokens, num_kept)
            self._doomed.append(Doomed(salt, tokens, num_kept, names))

    def tend(self) -> None:
        """Go on; quick, once a step."""
        self._erasing = [job for job in self._erasing if not job.done()]
        if self._doomed and self.tiers is not None:
            doomed = self._doomed[0]
            named = set(islice(doomed.unnamed, KEYS_A_TICK))
            doomed.keys |= named
            if not named and self._is_gone(doomed, self.tiers):
                self._doomed.popleft()
                self._erase(doomed, self.tiers)

    def close(self) -> None:
        """Wait for the disk."""
        self._disk_thread.shutdown()

    def _is_gone(self, doomed: Doomed, tiers: Tiers) -> bool:
        """Take what can be taken from device and host memory; False where something of it is being copied.

        Whatever is, to or from host memory, has a copy there that is held.
        """
        self._residency.forget(doomed.salt, doomed.tokens, doomed.num_kept)
        return all(tiers.host.forget(key) for key in doomed.keys)

    def _erase(self, doomed: Doomed, tiers: Tiers) -> None:
        if tiers.disk is not None and doomed.keys:
            self._erasing.append(self._disk_thread.submit(tiers.disk.erase, doomed.keys))


def names_of(keys: PageKeys, layout: KVLayout, salt: bytes, tokens: TokenArray, num_kept: int) -> Iterator[bytes]:
    """What pages of a history that end behind its first `num_kept` tokens may be called, tails of any length too."""
    before = keys.root(salt)
    for page in range(layout.complete_pages(len(tokens)) + 1):
        first, behind = keys.first_token(page), keys.first_token(page + 1)
        for end in range(max(first, num_kept + 1), min(behind, len(tokens) + 1)):
            yield keys.tail(before, tokens[first:end])
        before = keys.page(before, tokens[first:behind])
        if num_kept < behind <= len(tokens):
            yield before
