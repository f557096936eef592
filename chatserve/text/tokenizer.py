"""What this package needs of a tokenizer, and encoding of template pieces and of people's text with it.

Template pieces may name control tokens; people's text may not: a `<|im_end|>` somebody types stays text. It does not
know chat templates or messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

_ANCHOR = "\n"  # ordinary text that merges with nothing after it in vocabularies that prefix a space


class AddedToken(Protocol):
    """A token outside the model's own vocabulary; `special` ones are hidden when decoding."""

    @property
    def content(self) -> str: ...

    @property
    def special(self) -> bool: ...


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    def __len__(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]: ...

    def get_chat_template(self) -> str: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool, **kwargs: Any
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Markup:
    """Text of the chat template; control tokens in it are tokens."""

    text: str


@dataclass(frozen=True, slots=True)
class Plain:
    """Text of a person or a model; nothing in it is a control token."""

    text: str


@dataclass(frozen=True, slots=True)
class Ids:
    """Token ids taken as they are."""

    token_ids: tuple[int, ...]


Segment = Markup | Plain | Ids
Place = Literal["start", "after_control", "after_text"]


class Encoder:
    """Turns segments into token ids, as encoding their joined text would, but for control tokens in `Plain` ones.

    Neighbouring texts are encoded in one piece, so that a token may span template and message as in a full render.
    Safe to use from several threads at once: the tokenizer's settings never change after construction.
    """

    def __init__(self, tokenizer: Tokenizer, template_source: str = "") -> None:
        self._tokenizer = tokenizer
        added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
        self._control_ids = {content: token_id for content, token_id in added.items() if content}
        self._control = _any_of(self._control_ids)
        self._unsplit = _any_of(_unsplit_controls(tokenizer, template_source))
        self._control_set = frozenset(added.values())
        self._anchor_ids = self._encode_bare(_ANCHOR)
        self._bare_at = self._places_of_bare_text()

    def control_id(self, text: str) -> int | None:
        """The id of the control token with exactly this text."""
        return self._control_ids.get(text)

    def is_control(self, token_id: int) -> bool:
        """Whether this is an added token rather than one of the vocabulary's own."""
        return token_id in self._control_set

    def split_first_control(self, markup: str) -> tuple[str, str, str]:
        """Markup before, in and after its first control token; the last two are empty where it has none."""
        match = self._control.search(markup)
        if match is None:
            return markup, "", ""
        return markup[: match.start()], match[0], markup[match.end() :]

    def encode(self, segments: Iterable[Segment], place: Place = "start") -> list[int]:
        """The token ids of the segments' joined text, standing at `place` in a session's tokens."""
        token_ids: list[int] = []
        for run in _joined(self._pieces(segments)):
            if isinstance(run, str):
                token_ids += self._encode_text(run, place)
                place = "after_text"
            elif run:
                token_ids += run
                place = "after_control" if run[-1] in self._control_set else "after_text"
        return token_ids

    def _pieces(self, segments: Iterable[Segment]) -> Iterator[str | list[int]]:
        for segment in segments:
            if isinstance(segment, Ids):
                yield list(segment.token_ids)
            elif isinstance(segment, Plain):
                yield segment.text
            else:
                yield from self._markup_pieces(segment.text)

    def _markup_pieces(self, markup: str) -> Iterator[str | list[int]]:
        end = 0
        for match in self._control.finditer(markup):
            yield markup[end : match.start()]
            yield [self._control_ids[match[0]]]
            end = match.end()
        yield markup[end:]

    def _encode_text(self, text: str, place: Place) -> list[int]:
        token_ids: list[int] = []
        for part in self._harmless_parts(text):
            token_ids += self._encode_part(part, place)
            place = "after_text"
        return token_ids

    def _harmless_parts(self, text: str) -> Iterator[str]:
        """The text, cut inside every control token that the tokenizer would recognise in it."""
        start = 0
        while match := self._unsplit.search(text, start):
            yield text[start : match.start() + 1]
            start = match.start() + 1
        yield text[start:]

    def _encode_part(self, text: str, place: Place) -> list[int]:
        return self._encode_bare(text) if place in self._bare_at else self._encode_anchored(text)

    def _encode_anchored(self, text: str) -> list[int]:
        """Encode without the space that sentencepiece vocabularies put before a text's first word."""
        num_anchor = len(self._anchor_ids)
        token_ids = self._encode_bare(_ANCHOR + text)
        return token_ids[num_anchor:] if token_ids[:num_anchor] == self._anchor_ids else self._encode_bare(text)

    def _encode_bare(self, text: str) -> list[int]:
        if not text:
            return []
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _places_of_bare_text(self) -> frozenset[Place]:
        """Where the tokenizer's own treatment of a text's beginning is right; elsewhere its prefix must go."""
        sample = "ab"
        bare = self._encode_bare(sample)
        if bare == self._encode_anchored(sample):
            return frozenset({"start", "after_control", "after_text"})
        special = next((t.content for t in self._tokenizer.added_tokens_decoder.values() if t.special), "")
        joined = self._tokenizer.encode(special + sample, add_special_tokens=False, split_special_tokens=False)
        legacy = joined[1 if special else 0 :] == bare  # sentencepiece's `legacy` begins anew behind control tokens
        return frozenset({"start", "after_control"}) if legacy else frozenset({"start"})


def _unsplit_controls(tokenizer: Tokenizer, template_source: str) -> list[str]:
    """Control tokens that `split_special_tokens` leaves whole: not marked special, yet written by the template."""
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if not token.special and len(token.content.strip()) > 1 and token.content in template_source
    ]


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the words; nothing at all where there are none."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _joined(pieces: Iterable[str | list[int]]) -> Iterator[str | list[int]]:
    """Neighbouring texts made one, empty ones left out."""
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            yield text
        text = ""
        yield piece
    if text:
        yield text
