"""The bytes that each token stands for.

Decoding a growing reply from bytes needs neither a second look at earlier tokens nor a call of the tokenizer, and shows
where in the text each token ends. How a vocabulary spells bytes is found by trying, not by asking for its class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from chatserve.text.tokenizer import Tokenizer

_NUM_TRIED = 512
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd".encode()
_Spelling = Callable[[int], bytes]


class Vocabulary:
    """Bytes by token id; tokens hidden from people (special ones, gaps in the vocabulary) have none.

    A model may have more ids than its tokenizer: those beyond it are shown as U+FFFD.

    `strips_leading_space` says that decoding drops one space at the start of a text, as sentencepiece does.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._hidden = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self._bytes: dict[int, bytes] = {}
        self._reference = next(iter(self._ordinary_ids(len(tokenizer))), None)
        self._spelling = self._find_spelling()
        if self._spelling != self._by_difference:  # which is slow: token by token, as they come
            self._bytes = {i: self._look_up(i) for i in range(len(tokenizer))}
        self.strips_leading_space = self._find_leading_strip()

    def __len__(self) -> int:
        return len(self._tokens)

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to the UTF-8 text; empty for hidden ids."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> bytes:
        if token_id >= len(self):
            return _REPLACEMENT
        return b"" if token_id in self._hidden else self._spelling(token_id)

    def _find_spelling(self) -> _Spelling:
        for spelling in (self._byte_level, self._sentencepiece):
            if all(self._agrees(spelling, token_id) for token_id in self._tried_ids()):
                return spelling
        return self._by_difference

    def _tried_ids(self) -> Iterator[int]:
        """The first ids, where single bytes stand, and as many from all over the vocabulary."""
        step = max(1, len(self) // _NUM_TRIED)
        yield from self._ordinary_ids(min(_NUM_TRIED, len(self)))
        yield from self._ordinary_ids(len(self), step)

    def _ordinary_ids(self, stop: int, step: int = 1) -> Iterator[int]:
        added = self._tokenizer.added_tokens_decoder
        return (i for i in range(0, stop, step) if i not in added and self._tokens[i])

    def _agrees(self, spelling: _Spelling, token_id: int) -> bool:
        shown = self._decode([token_id])
        spelled = spelling(token_id).decode(errors="replace")
        return shown == spelled or " " + shown == spelled

    def _find_leading_strip(self) -> bool:
        tokens = (i for i in self._ordinary_ids(len(self)) if self.bytes_of(i).startswith(b" "))
        token_id = next(tokens, None)
        return token_id is not None and not self._decode([token_id]).startswith(" ")

    def _byte_level(self, token_id: int) -> bytes:
        token = self._tokens[token_id] or ""
        try:
            return token.translate(_TO_LATIN_1).encode("latin-1")
        except UnicodeEncodeError:  # it is spelled as it is
            return token.encode()

    def _sentencepiece(self, token_id: int) -> bytes:
        token = self._tokens[token_id] or ""
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()

    def _by_difference(self, token_id: int) -> bytes:
        """For other decoders: what the token adds behind an ordinary one."""
        if self._reference is None:
            return self._decode([token_id]).encode()
        behind = self._decode([self._reference, token_id])
        return behind.removeprefix(self._decode([self._reference])).encode()

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes, each with the Latin-1 character of its byte; no other one has."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = dict.fromkeys(others, "\ufffd") | {byte: chr(byte) for byte in printable}
    return alphabet | {256 + index: chr(byte) for index, byte in enumerate(others)}


_TO_LATIN_1 = _byte_alphabet()
