"""The model's chat template, taken apart by probing so that a turn renders only what is new.

What stands between a reply and the next user message, and behind that message, is found once by rendering marks. It
knows messages by role and text only; people's text never passes through the template engine, a mark does.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chatserve.errors import StartupError
from chatserve.text.tokenizer import Ids, Markup, Plain, Segment, Tokenizer

_OPEN, _CLOSE = "\ue000", "\ue001"  # private use: no template writes them, none trims or changes them
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_PADDING = " \n"
_NOW = re.compile(r"""strftime_now\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message as the template sees it; its content is what stands where the template puts it."""

    role: str
    content: tuple[Plain | Ids, ...]


@dataclass(frozen=True, slots=True)
class TurnPieces:
    """Template text from a reply's last character to the next user message, and from there to the next reply."""

    before_user: str
    after_user: str


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
        self._trims = {role: self._trimmed_sides(role) for role in ("system", "user", "assistant")}
        self._check_user_survives()

    def turn_pieces(self, date: str) -> TurnPieces | None:
        """What to put around a later user message, or None when only a whole render is right for this template."""
        return self._pieces(date)

    def user_text(self, text: str) -> str:
        """A user's text as the template would put it: some templates trim it."""
        return self._trimmed(Plain(text), "user", first=True, last=True).text

    def render(self, messages: Sequence[ChatMessage], date: str) -> list[Segment]:
        """The whole conversation, ready for the next reply. A message the template leaves out is left out."""
        return list(self._segments(messages, self._render_marks([message.role for message in messages], date)))

    def _segments(self, messages: Sequence[ChatMessage], rendered: str) -> Iterator[Segment]:
        parts = _MARK.split(rendered)
        yield Markup(parts[0])
        for index, markup in zip(parts[1::2], parts[2::2], strict=True):
            yield from self._content(messages[int(index)])
            yield Markup(markup)

    def _content(self, message: ChatMessage) -> Iterator[Segment]:
        last = len(message.content) - 1
        for index, segment in enumerate(message.content):
            if isinstance(segment, Plain):
                yield self._trimmed(segment, message.role, first=index == 0, last=index == last)
            else:
                yield segment

    def _trimmed(self, segment: Plain, role: str, *, first: bool, last: bool) -> Plain:
        trims_left, trims_right = self._trims[role]
        text = segment.text.lstrip() if first and trims_left else segment.text
        return Plain(text.rstrip() if last and trims_right else text)

    def _render_marks(self, roles: Sequence[str], date: str) -> str:
        return self._render([(role, f"{_OPEN}{index}{_CLOSE}") for index, role in enumerate(roles)], date)

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
        rendered = self._try_render([("user", "x"), ("assistant", _mark(0)), ("user", _mark(1))], date)
        parts = _MARK.split(rendered or "")
        if parts[1::2] != ["0", "1"]:
            return None
        return TurnPieces(before_user=parts[2], after_user=parts[4])

    def _try_render(self, messages: Sequence[tuple[str, str]], date: str = "2000-01-01") -> str | None:
        try:
            return self._render(messages, date)
        except Exception:  # a template is a program of its own: whatever it raises, it cannot render these roles
            return None

    def _renders_system(self) -> bool:
        return _mark(0) in (self._try_render([("system", _mark(0)), ("user", "x")]) or "")

    def _trimmed_sides(self, role: str) -> tuple[bool, bool]:
        """Whether the template drops white space at the left and the right end of what `role` says."""
        plain = self._try_render(_example(role, _mark(0)))
        left = self._try_render(_example(role, _PADDING + _mark(0)))
        right = self._try_render(_example(role, _mark(0) + _PADDING))
        return plain is not None and left == plain, plain is not None and right == plain

    def _check_user_survives(self) -> None:
        try:
            rendered = self._render([("user", _mark(0))], "2000-01-01")
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


def _mark(index: int) -> str:
    return f"{_OPEN}{index}{_CLOSE}"


def _example(role: str, content: str) -> list[tuple[str, str]]:
    """The shortest conversation that a template accepts and in which `role` says `content`."""
    if role == "user":
        return [(role, content)]
    return [(role, content), ("user", "x")] if role == "system" else [("user", "x"), (role, content), ("user", "y")]
