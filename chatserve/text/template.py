"""The model's chat template, taken apart by probing so that a turn renders only what is new.

What stands between a reply and the next user message, and behind that message, is found once by rendering marks. It
knows messages by role and text only; people's text never passes through the template engine, a mark does.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from chatserve.errors import StartupError
from chatserve.text.tokenizer import Ids, Markup, Plain, Segment, Tokenizer

_OPEN, _CLOSE = "\ue000", "\ue001"  # private use: no template writes them, none trims or changes them
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_LEFT, _RIGHT = " ", "  "  # paddings of different length, so that one sum of lengths says which of them survived
_NOW = re.compile(r"""strftime_now\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")
_ANY_DATE = "2000-01-01"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message as the template sees it; its content is what stands where the template puts it."""

    role: str
    content: tuple[Plain | Ids, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a message's content stands in a render, and at which ends the template drops white space from it."""

    index: int
    trims_left: bool = False
    trims_right: bool = False

    def fill(self, content: Sequence[Plain | Ids]) -> list[Plain | Ids]:
        """The content as the template would put it here."""
        filled = list(content)
        if filled and self.trims_left and isinstance(filled[0], Plain):
            filled[0] = Plain(filled[0].text.lstrip())
        if filled and self.trims_right and isinstance(filled[-1], Plain):
            filled[-1] = Plain(filled[-1].text.rstrip())
        return filled


@dataclass(frozen=True, slots=True)
class TurnPieces:
    """Template text from a reply's last character to the next user message, and from there to the next reply.

    `before_reply` is white space that a reply said elsewhere needs before it: models begin theirs with it.
    """

    before_user: str
    user: Slot
    after_user: str
    before_reply: str = ""


class ChatTemplate:
    """Renders conversations with the template of `tokenizer`.

    `date` arguments (ISO, as `2026-07-31`) stand in for today wherever a template asks for it.
    Raises StartupError when there is no template, or one that loses what the user says.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.source = _template_source(tokenizer)
        self._formats = tuple({match[1:-1] for match in _NOW.findall(self.source)})
        self._frozen_source = _NOW.sub(r"frozen_dates[\1]", self.source)
        self._pieces = functools.lru_cache(maxsize=64)(self._probe_pieces)
        self.takes_system = self._renders_system()
        self._check_user_survives()

    def turn_pieces(self, date: str) -> TurnPieces | None:
        """What to put around a later user message, or None when only a whole render is right for this template."""
        return self._pieces(date)

    def render(self, messages: Sequence[ChatMessage], date: str) -> list[Segment]:
        """The whole conversation, ready for the next reply. A message the template leaves out is left out."""
        return _filled(self._parts([message.role for message in messages], date), messages)

    def render_whole(self, messages: Sequence[ChatMessage], date: str) -> list[Segment] | None:
        """The same, or None where the template refuses these roles or leaves a message out."""
        parts = self._try_parts([message.role for message in messages], date)
        if [part.index for part in parts if isinstance(part, Slot)] != list(range(len(messages))):
            return None
        return _filled(parts, messages)

    def _parts(self, roles: Sequence[str], date: str) -> list[str | Slot]:
        """A conversation of these roles: template text, a slot, template text, and so on."""
        marks = [_mark(index) for index in range(len(roles))]
        texts = _MARK.split(self._render(list(zip(roles, marks, strict=True)), date))
        padded = [_LEFT + mark + _RIGHT for mark in marks]
        padded_texts = _MARK.split(self._render(list(zip(roles, padded, strict=True)), date))
        growths = [len(after) - len(before) for before, after in zip(texts[::2], padded_texts[::2], strict=False)]
        parts: list[str | Slot] = [texts[0]]
        for position, (index, text) in enumerate(zip(texts[1::2], texts[2::2], strict=True)):
            parts += [_slot(int(index), growths[position : position + 2]), text]
        return parts

    def _render(self, messages: Sequence[tuple[str, str]], date: str) -> str:
        day = datetime.date.fromisoformat(date)
        return self._tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=True,
            chat_template=self._frozen_source,
            frozen_dates={format: day.strftime(format) for format in self._formats},
        )

    def _probe_pieces(self, date: str) -> TurnPieces | None:
        match self._try_parts(["user", "assistant", "user"], date):
            case [str(), Slot(index=0), str(answer), Slot(index=1), str(before), Slot(index=2) as user, str(after)]:
                space = answer.removeprefix(after)
                return TurnPieces(before, user, after, space if space.isspace() else "")
        return None

    def _try_parts(self, roles: Sequence[str], date: str = _ANY_DATE) -> list[str | Slot]:
        try:
            return self._parts(roles, date)
        except Exception:  # noqa: BLE001 - a template is a program; whatever it raises, it cannot render these roles
            return []

    def _renders_system(self) -> bool:
        slots = [part.index for part in self._try_parts(["system", "user"]) if isinstance(part, Slot)]
        return 0 in slots

    def _check_user_survives(self) -> None:
        try:
            rendered = self._render([("user", _mark(0))], _ANY_DATE)
        except Exception as error:  # a template is a program of its own and raises what it likes
            raise StartupError(f"the chat template cannot render a single user message: {error}") from error
        if _MARK.findall(rendered) != ["0"]:
            raise StartupError(
                "the chat template does not put the user's text into the prompt exactly once; "
                "serve a model whose template does, or correct chat_template.jinja in its directory"
            )


def _template_source(tokenizer: Tokenizer) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise StartupError(
            "the model has no chat template; serve a chat model, or put chat_template.jinja into its directory"
        ) from error


def _filled(parts: Sequence[str | Slot], messages: Sequence[ChatMessage]) -> list[Segment]:
    segments: list[Segment] = []
    for part in parts:
        segments += [Markup(part)] if isinstance(part, str) else part.fill(messages[part.index].content)
    return segments


def _mark(index: int) -> str:
    return f"{_OPEN}{index}{_CLOSE}"


def _slot(index: int, growths: Sequence[int]) -> Slot:
    """Which paddings survived, from how much the template text before and behind grew by them."""
    if len(growths) < 2:
        return Slot(index)
    before, behind = growths
    return Slot(index, trims_left=not before & len(_LEFT), trims_right=not behind & len(_RIGHT))
