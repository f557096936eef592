"""Stop strings in a text that arrives in pieces: nothing that may belong to one is shown too early."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class StopFilter:
    """Passes text on up to the first stop string, which is cut off with everything behind it.

    The result depends on the text only, not on how it is cut into pieces: of several stop strings the one that is
    complete first ends the text, and of those the longest.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    @property
    def is_needed(self) -> bool:
        """Whether there is any stop string."""
        return bool(self._stops)

    @property
    def held(self) -> str:
        """Text kept back because it could be the beginning of a stop string."""
        return self._held

    def push(self, text: str) -> str:
        """The part of what is held and `text` that can be shown now. Raises ValueError behind a stop string."""
        if self.stopped:
            raise ValueError(f"text {text!r} behind a stop string")
        text = self._held + text
        found = min(self._found(text), default=None)
        if found is not None:
            self.stopped = True
            self._held = ""
            return text[: found[1]]
        keep = len(text) - self._num_held(text)
        self._held = text[keep:]
        return text[:keep]

    def release(self) -> str:
        """What was held back, after the end of the text: it began no stop string after all."""
        text, self._held = self._held, ""
        return text

    def _found(self, text: str) -> Iterator[tuple[int, int]]:
        """End and start of each stop string's first occurrence."""
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0:
                yield start + len(stop), start

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        return max((_overlap(text, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
