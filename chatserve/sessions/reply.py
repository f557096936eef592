"""One reply as it grows: token ids in, text out, and which ids stand when the text is cut at a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from chatserve.text.detokenize import Detokenizer
from chatserve.text.stop import StopFilter


class Reply:
    """The text that was given out so far depends on the ids only, not on how they came in batches.

    `end_ids` are the tokens that end a reply; they are kept, without text. `is_over` says that nothing may follow.
    """

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str], end_ids: Iterable[int]) -> None:
        self._detokenizer = detokenizer
        self._stop_filter = StopFilter(stops)
        self._end_ids = frozenset(end_ids)
        self._decoded: list[str] = []
        self._shown: list[str] = []
        self._whole_ends: list[tuple[int, int]] = [(0, 0)]  # (tokens, code points): ends of tokens between characters
        self._num_decoded = 0
        self._ended = False
        self.token_ids: list[int] = []
        self.num_shown = 0

    @property
    def is_over(self) -> bool:
        """Whether an end token or a stop string has come."""
        return self._ended or self._stop_filter.stopped

    @property
    def is_cut(self) -> bool:
        """Whether a stop string has come: the engine does not know of it."""
        return self._stop_filter.stopped

    @property
    def text(self) -> str:
        """All that was given out."""
        return "".join(self._shown)

    def push(self, token_ids: Iterable[int]) -> tuple[str, list[int]]:
        """The text these ids complete, and those of them that were taken: none behind the end of the reply."""
        num_before = len(self.token_ids)
        texts = []
        for token_id in token_ids:
            if self.is_over:
                break
            texts.append(self._push_one(token_id))
        return self._show("".join(texts)), self.token_ids[num_before:]

    def release(self) -> str:
        """What was held back as the possible beginning of a stop string, when the reply ends without one."""
        return self._show(self._stop_filter.release())

    def kept(self) -> tuple[list[int], str]:
        """The ids that stand, and the end of the text that none of them covers."""
        if not self._stop_filter.stopped:
            return list(self.token_ids), ""
        num_tokens, num_chars = max(end for end in self._whole_ends if end[1] <= self.num_shown)
        return self.token_ids[:num_tokens], "".join(self._decoded)[num_chars : self.num_shown]

    def _push_one(self, token_id: int) -> str:
        self.token_ids.append(token_id)
        decoded = self._detokenizer.push(token_id)
        self._ended = token_id in self._end_ids
        if self._ended:
            decoded += self._detokenizer.flush()
        return self._filter(decoded) if self._stop_filter.is_needed else decoded

    def _filter(self, decoded: str) -> str:
        """What of this can be shown; where tokens end is remembered, because a stop string may cut behind any."""
        self._decoded.append(decoded)
        self._num_decoded += len(decoded)
        if not self._detokenizer.is_partial:
            self._whole_ends.append((len(self.token_ids), self._num_decoded))
        text = self._stop_filter.push(decoded)
        if self._ended and not self._stop_filter.stopped:
            text += self._stop_filter.release()
        return text

    def _show(self, text: str) -> str:
        self._shown.append(text)
        self.num_shown += len(text)
        return text
