"""From a path of messages to the token ids of the next prompt, and from token ids to text.

Stored token ids are the truth: a turn encodes its new text only and old messages are never encoded again, unless the
chat template or a change of model leaves no other way. It knows no sessions, storage or engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from typing import Literal

from chatserve.text.detokenize import Detokenizer, decode
from chatserve.text.template import ChatMessage, ChatTemplate
from chatserve.text.tokenizer import Encoder, Ids, Markup, Place, Plain, Segment, Tokenizer
from chatserve.text.vocabulary import Vocabulary

LONG_TEXT_CHARS = 16_384  # some milliseconds of encoding: too long for the event loop
MANY_MESSAGES = 16  # as long, at a third of a millisecond each
RenderReason = Literal["template_changed", "model_changed"]


@dataclass(frozen=True, slots=True)
class PathMessage:
    """One message on the way from the session's beginning to what must be answered.

    `token_ids` is what it added to the path; `pending_text` the end of a reply that no token of it covers. `foreign`:
    the ids are another model's, only the text holds.
    """

    role: str
    text: str
    token_ids: Sequence[int]
    pending_text: str = ""
    foreign: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the engine must continue.

    The first `num_history` of `token_ids` were in an earlier prompt or reply on this path. `added_ids` is what a new
    user message adds, empty where all was rendered anew; `reason` says why less than the whole path was kept.
    """

    token_ids: list[int]
    num_history: int
    added_ids: list[int]
    reason: RenderReason | None = None


class TextPipeline:
    """Template, tokenizer and detokenizer of one model.

    `eos_token_ids` end a reply. Raises StartupError where the chat template cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Iterable[int]) -> None:
        self.eos_token_ids = tuple(eos_token_ids)
        self._template = ChatTemplate(tokenizer)
        self._tokenizer = tokenizer
        self._encoder = Encoder(tokenizer, self._template.source)
        self._vocabulary = Vocabulary(tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of token ids; valid ones lie below it."""
        return len(self._vocabulary)

    def detokenizer(self, before: Iterable[int] | None = None) -> Detokenizer:
        """A decoder for a new reply, or for one that goes on behind the ids `before`."""
        return Detokenizer(self._vocabulary, before)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of these ids without special tokens."""
        return decode(self._vocabulary, token_ids)

    async def encode_raw(self, text: str) -> list[int]:
        """The ids of a text that is a whole prompt already: control tokens in it are tokens, no template is applied.

        The tokenizer puts its own beginning before it. Long texts are encoded in a thread.
        """
        if len(text) > LONG_TEXT_CHARS:
            return await asyncio.to_thread(self._encode_raw, text)
        return self._encode_raw(text)

    def _encode_raw(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=True, split_special_tokens=False)

    async def prompt(
        self,
        path: Sequence[PathMessage],
        said: str | Sequence[int] | None,
        *,
        instructions: str | None,
        date: str,
    ) -> Prompt:
        """The prompt of a turn: `path`, then what the user says as text or raw ids; None adds nothing.

        Long texts are encoded in a thread.
        """
        num_chars = len(said or "") + len(instructions or "")
        if not self._can_append(path, date):
            num_chars += sum(len(message.text) for message in path)
        if num_chars > LONG_TEXT_CHARS:
            return await asyncio.to_thread(self._prompt, path, said, instructions, date)
        return self._prompt(path, said, instructions, date)

    async def extended(
        self, path: Sequence[PathMessage], said: Sequence[PathMessage], *, instructions: str | None, date: str
    ) -> list[PathMessage]:
        """`path` and behind it messages that were said elsewhere, of which only roles and texts are known.

        User messages get the ids they would have got here; a reply's text goes into those of the message after it.
        What is much is encoded in a thread.
        """
        if len(said) > MANY_MESSAGES or sum(len(message.text) for message in said) > LONG_TEXT_CHARS:
            return await asyncio.to_thread(self._extended, path, said, instructions, date)
        return self._extended(path, said, instructions, date)

    async def conversation(
        self, said: Sequence[PathMessage], *, instructions: str | None, date: str
    ) -> list[int] | None:
        """The prompt for a conversation in any order of roles, or None where the chat template does not take it."""
        messages = [replace(message, token_ids=(), pending_text=message.text) for message in said]
        return await asyncio.to_thread(self._conversation, messages, instructions, date)

    def _conversation(self, path: Sequence[PathMessage], instructions: str | None, date: str) -> list[int] | None:
        messages = list(_one_message_per_turn(self._with_instructions(path, instructions)))
        segments = self._template.render_whole(messages, date)
        return None if segments is None else self._encoder.encode(segments)

    def _extended(
        self, path: Sequence[PathMessage], said: Sequence[PathMessage], instructions: str | None, date: str
    ) -> list[PathMessage]:
        longer = list(path)
        pieces = self._template.turn_pieces(date) if self._can_append(path, date) else None
        last_ids = next((list(message.token_ids[-1:]) for message in reversed(longer) if message.token_ids), [])
        for message in said:
            added: list[int] = []
            if message.role == "user" and pieces is not None:
                added = self._added(longer, message.text, last_ids, instructions, date)
                last_ids = added[-1:]
            pending_text = ""
            if message.role == "assistant":
                pending_text = (pieces.before_reply if pieces else "") + message.text
            longer.append(replace(message, token_ids=added, pending_text=pending_text))
        return longer

    def _added(
        self, path: Sequence[PathMessage], said: str, history: Sequence[int], instructions: str | None, date: str
    ) -> list[int]:
        """What a user message adds behind `path`, whose ids end as `history` does."""
        if path:
            return self._encode_turn(said, history, path[-1].pending_text, date)
        return self._render([PathMessage("user", said, ())], instructions, date)

    def _prompt(
        self, path: Sequence[PathMessage], said: str | Sequence[int] | None, instructions: str | None, date: str
    ) -> Prompt:
        if not self._can_append(path, date):
            return self._render_anew(path, said, instructions, date)
        history = list(chain.from_iterable(message.token_ids for message in path))
        if said is None:
            added = []
        elif not isinstance(said, str):
            added = list(said)
        else:
            added = self._added(path, said, history, instructions, date)
        return Prompt(history + added, len(history), added)

    def _can_append(self, path: Sequence[PathMessage], date: str) -> bool:
        if not path:
            return True
        known = all(message.token_ids or message.role != "user" for message in path)
        own = not any(message.foreign for message in path)
        return known and own and self._template.turn_pieces(date) is not None

    def _encode_turn(self, text: str, history: Sequence[int], pending_text: str, date: str) -> list[int]:
        """What a later user message adds behind `history`; the template's end of a reply is not written twice."""
        pieces = self._template.turn_pieces(date)
        assert pieces is not None
        _, control, rest = self._encoder.split_first_control(pieces.before_user)
        ended = bool(control) and history[-1:] == [self._encoder.control_id(control)]
        before = Markup(rest) if ended else Markup(pieces.before_user)
        user = pieces.user.fill([Plain(text)])
        segments: list[Segment] = [Plain(pending_text), before, *user, Markup(pieces.after_user)]
        return self._encoder.encode(segments, self._place_behind(history))

    def _place_behind(self, history: Sequence[int]) -> Place:
        if not history:
            return "start"
        return "after_control" if self._encoder.is_control(history[-1]) else "after_text"

    def _render_anew(
        self, path: Sequence[PathMessage], said: str | Sequence[int] | None, instructions: str | None, date: str
    ) -> Prompt:
        before = self._render(path, instructions, date)
        if said is None:
            return Prompt(before, len(before), [], None)
        if not isinstance(said, str):
            return Prompt([*before, *said], len(before), list(said), None)
        whole = self._render([*path, PathMessage("user", said, ())], instructions, date)
        if path and path[-1].foreign:
            return Prompt(whole, 0, [], "model_changed")
        num_history = _common_prefix(before, whole)
        return Prompt(whole, num_history, [], "template_changed" if num_history < len(before) else None)

    def _render(self, path: Sequence[PathMessage], instructions: str | None, date: str) -> list[int]:
        """The whole path through the template; a reply at its end stays open, to be gone on with."""
        num_closed = len(path) - sum(1 for _ in takewhile(lambda m: m.role == "assistant", reversed(path)))
        messages = list(_one_message_per_turn(self._with_instructions(path[:num_closed], instructions)))
        segments: list[Segment] = self._template.render(messages, date) if messages else []
        for message in path[num_closed:]:
            segments += self._reply(message)
        return self._encoder.encode(segments)

    def _with_instructions(self, path: Sequence[PathMessage], instructions: str | None) -> Iterator[ChatMessage]:
        """The messages for the template; where it takes no system message, the first user message says it."""
        first = Plain(f"{instructions}\n\n") if instructions else None
        if first and self._template.takes_system:
            yield ChatMessage("system", (Plain(instructions or ""),))
            first = None
        for message in path:
            content = self._content(message)
            if first and message.role == "user":
                content, first = (first, *content), None
            yield ChatMessage(message.role, content)

    def _content(self, message: PathMessage) -> tuple[Plain | Ids, ...]:
        if message.role != "assistant":
            return (Plain(message.text),)
        if message.token_ids and message.token_ids[-1] in self.eos_token_ids:
            return self._reply(replace(message, token_ids=message.token_ids[:-1]))  # the template writes the end
        return self._reply(message)

    def _reply(self, message: PathMessage) -> tuple[Plain | Ids, ...]:
        if message.foreign:
            return (Plain(message.text),)
        return (Ids(tuple(message.token_ids)), Plain(message.pending_text))


def _one_message_per_turn(messages: Iterable[ChatMessage]) -> Iterator[ChatMessage]:
    """A reply and its continuation are one message to a template."""
    held: ChatMessage | None = None
    for message in messages:
        if held and held.role == message.role == "assistant":
            held = replace(held, content=(*held.content, *message.content))
            continue
        if held:
            yield held
        held = message
    if held:
        yield held


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
