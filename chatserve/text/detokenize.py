"""From token ids, one after the other, to text that is never taken back and never ends in half a code point."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from chatserve.text.vocabulary import Vocabulary


class Detokenizer:
    """Decodes one reply as it grows.

    `before` are ids the reply goes on from: half a code point at their end is completed here, and a first space is
    kept. Bytes that are not UTF-8 become U+FFFD, as in the tokenizer's own decoding.
    """

    def __init__(self, vocabulary: Vocabulary, before: Iterable[int] | None = None) -> None:
        self._bytes_of = vocabulary.bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = vocabulary.strips_leading_space and before is None
        for token_id in before or ():
            self.push(token_id)

    @property
    def is_partial(self) -> bool:
        """Whether bytes of an unfinished code point are held back."""
        return bool(self._utf8.getstate()[0])

    def push(self, token_id: int) -> str:
        """The code points that this token completes."""
        data = self._bytes_of(token_id)
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is held back, as U+FFFD: the text ends here and the rest of the code point will never come."""
        return self._utf8.decode(b"", final=True)


def decode(vocabulary: Vocabulary, token_ids: Iterable[int]) -> str:
    """The whole text of these ids, as a `Detokenizer` would give it piece by piece."""
    data = b"".join([vocabulary.bytes_of(token_id) for token_id in token_ids])
    if vocabulary.strips_leading_space:
        data = data.removeprefix(b" ")
    return data.decode("utf-8", "replace")
