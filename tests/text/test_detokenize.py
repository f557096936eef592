"""Text comes out of token ids piece by piece exactly as the tokenizer decodes them all at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserve.text.detokenize import Detokenizer, decode
from chatserve.text.vocabulary import Vocabulary
from tests.text.tokenizers import FAMILIES, LLAMA2, chatml, sentencepiece

BYTE_LEVEL = Vocabulary(chatml())
SENTENCEPIECE = Vocabulary(sentencepiece(LLAMA2, legacy=False))
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def decoded(tokenizer: Any, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@given(st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=60))
def test_any_byte_level_ids_decode_as_the_tokenizer_does(token_ids: list[int]) -> None:
    """Concatenated deltas of random ids, broken UTF-8 and special tokens among them, equal the full decoding."""
    assert decode(BYTE_LEVEL, token_ids) == decoded(chatml(), token_ids)


@given(st.lists(ANY_TEXT | st.just("</s>"), max_size=8))
def test_sentencepiece_ids_of_any_text_decode_as_the_tokenizer_does(texts: list[str]) -> None:
    """Words with leading spaces, byte tokens and special tokens give what the tokenizer's own decoding gives."""
    tokenizer = sentencepiece(LLAMA2, legacy=False)
    token_ids = [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False)]
    assert decode(SENTENCEPIECE, token_ids) == decoded(tokenizer, token_ids)


@given(st.lists(st.integers(0, len(SENTENCEPIECE) - 1), max_size=60))
def test_any_sentencepiece_ids_keep_every_whole_character(token_ids: list[int]) -> None:
    """Broken byte tokens become U+FFFD and cost no readable character (the tokenizer drops whole runs of them)."""
    expected = decoded(sentencepiece(LLAMA2, legacy=False), token_ids)
    text = decode(SENTENCEPIECE, token_ids)
    assert _is_subsequence(expected.replace("\ufffd", ""), text)
    if "\ufffd" not in expected:
        assert text == expected


def _is_subsequence(few: str, many: str) -> bool:
    rest = iter(many)
    return all(char in rest for char in few)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_a_code_point_is_never_sent(family: str) -> None:
    """Every delta of a text of four-byte characters holds whole ones only."""
    tokenizer = FAMILIES[family]()
    detokenizer = Detokenizer(Vocabulary(tokenizer))
    token_ids = tokenizer.encode("😀é漢😀", add_special_tokens=False)
    deltas = [detokenizer.push(token_id) for token_id in token_ids]
    assert len(token_ids) > 4
    assert "".join(deltas) == "😀é漢😀"
    assert not any("\ufffd" in delta for delta in deltas)


def test_an_unfinished_code_point_is_held_until_the_flush() -> None:
    """Half a character is held back; the flush gives U+FFFD for it, as decoding all ids does."""
    tokenizer = chatml()
    half = tokenizer.encode("😀", add_special_tokens=False)[:2]
    detokenizer = Detokenizer(BYTE_LEVEL)
    assert [detokenizer.push(token_id) for token_id in half] == ["", ""]
    assert detokenizer.is_partial
    assert detokenizer.flush() == decoded(tokenizer, half) == "\ufffd"


def test_a_continued_reply_completes_the_code_point_before_it() -> None:
    """A reply that goes on behind half a character gives the whole of it."""
    token_ids = chatml().encode("😀", add_special_tokens=False)
    detokenizer = Detokenizer(BYTE_LEVEL, before=token_ids[:2])
    assert "".join(detokenizer.push(token_id) for token_id in token_ids[2:]) == "😀"


def test_a_continued_sentencepiece_reply_keeps_its_space() -> None:
    """The space before a word is dropped at the start of a reply only, not where one goes on."""
    hello = sentencepiece(LLAMA2, legacy=False).encode("Hello", add_special_tokens=False)
    first, second = Detokenizer(SENTENCEPIECE), Detokenizer(SENTENCEPIECE, before=hello)
    assert "".join(map(first.push, hello)) == "Hello"
    assert "".join(map(second.push, hello)) == " Hello"


def test_a_vocabulary_of_another_kind_is_read_by_difference() -> None:
    """A decoder that is neither byte-level nor sentencepiece (WordPiece's `##`) still gives growing text."""
    vocabulary = Vocabulary(_WordPieces())
    assert decode(vocabulary, [1, 2, 3, 1]) == "playing dog play"


class _WordPieces:
    """A tokenizer whose words part by spaces unless a piece begins with `##`."""

    tokens = ("[CLS]", "play", "##ing", "dog")
    added_tokens_decoder = {0: type("Added", (), {"content": "[CLS]", "special": True})()}  # noqa: RUF012 - a double

    def __len__(self) -> int:
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [self.tokens[i] for i in ids]

    def decode(self, token_ids: list[int], **_: Any) -> str:
        words = [self.tokens[i] for i in token_ids if i != 0]
        return " ".join(words).replace(" ##", "").removeprefix("##")

    def encode(self, text: str, **_: Any) -> list[int]:
        return [self.tokens.index(word) for word in text.split()]

    def get_chat_template(self) -> str:
        return ""

    def apply_chat_template(self, conversation: Any, **_: Any) -> str:
        return ""


def test_ids_beyond_the_vocabulary():
    """A model may have more ids than its tokenizer: each is one U+FFFD, also amid half a code point."""
    half = chatml().encode("é", add_special_tokens=False)[:1]
    assert decode(BYTE_LEVEL, [len(BYTE_LEVEL), 1 << 20]) == "\ufffd" * 2
    assert decode(BYTE_LEVEL, [*half, len(BYTE_LEVEL)]) == "\ufffd" * 2
