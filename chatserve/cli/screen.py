"""How `chatserve chat` looks: replies on standard output, everything else beside them.

On a terminal that is the same place, only dimmer, and replies are shown as the Markdown that they are; elsewhere
remarks go to stderr, so that a pipe gets replies only, as they were said.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from chatserve.cli.text import printable

PROMPT = "you> "
REFRESHES_A_SECOND = 12


class Screen:
    """Reads lines and writes replies. `interactive` when both ends are a terminal."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._out = Console(highlight=False)
        self._shows_markdown = self.interactive and not self._out.is_dumb_terminal
        self._said = ""
        self._live: Live | None = None
        self._remarks = self._out if self.interactive else Console(stderr=True, highlight=False)

    def lines(self) -> Iterator[str]:
        """What the person types, until the end of input. Ctrl-C at the prompt starts a new line."""
        while True:
            try:
                yield input(PROMPT if self.interactive else "")
            except KeyboardInterrupt:
                self.remark("\nCtrl-D or /quit leaves.")
            except EOFError:
                if self.interactive:
                    self._out.print()
                return

    def message(self, role: str, text: str) -> None:
        """One message of the history."""
        name = Text("you> " if role == "user" else f"{role}> ", style="bold")
        if self._shows_markdown and role != "user":
            self._out.print(name)
            self._out.print(_markdown(text))
        else:
            self._remark(name + Text(printable(text)))

    def reply_part(self, text: str) -> None:
        """The next piece of a reply."""
        if not self._shows_markdown:
            self._out.print(Text(printable(text)), end="", soft_wrap=True)
            return
        self._said += text
        if self._live is None:
            self._live = Live(console=self._out, refresh_per_second=REFRESHES_A_SECOND, transient=True)
            self._live.start()
        self._live.update(_Newest(_markdown(self._said)))

    def reply_end(self) -> None:
        """The reply is complete, or says no more for now."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._out.print(_markdown(self._said) if self._shows_markdown else "")
        self._said = ""

    def remark(self, text: str) -> None:
        """Something about the conversation rather than in it."""
        self._remark(Text(printable(text), style="dim"))

    def problem(self, text: str) -> None:
        """Something went wrong."""
        self._remark(Text(printable(text), style="red"))

    def note(self, text: str) -> None:
        """Something that was asked for, such as a line of the list of sessions."""
        self._remark(Text(printable(text)))

    def _remark(self, text: Text) -> None:
        """Lines as they are: where they are long, the terminal breaks them."""
        self._remarks.print(text, soft_wrap=True)


class _Newest:
    """As much of a reply's end as the screen has room for."""

    def __init__(self, reply: Markdown) -> None:
        self._reply = reply

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in console.render_lines(self._reply, options, new_lines=True)[1 - console.height :]:
            yield from line


def describe_turn(response: Mapping[str, Any], max_context: int | None) -> str:
    """One line on how a turn ended, unless by itself, and what it cost."""
    usage, timings = response["usage"], response["timings"]
    cached = usage["input_tokens_details"]["cached_tokens"]
    tiers = [tier for tier, count in usage["cached_tokens_details"].items() if count]
    origin = f" from {' and '.join(tiers)}" if tiers else ""
    parts = [
        *_ending(response),
        f"{cached:,} of {usage['input_tokens']:,} input tokens cached{origin}",
        f"first token {timings['ttft_ms']:,.0f} ms",
        f"{timings['tokens_per_second']:,.0f} tokens/s",
    ]
    if max_context:
        parts.append(f"{max(0, max_context - usage['total_tokens']):,} of {max_context:,} tokens left")
    return " · ".join(parts)


def _markdown(text: str) -> Markdown:
    """A reply as people read it; where a link leads is shown, not hidden behind its words."""
    return Markdown(printable(text), hyperlinks=False)


def _ending(response: Mapping[str, Any]) -> list[str]:
    if response["status"] == "cancelled":
        return ["stopped"]
    if response["status"] == "incomplete":
        return [f"cut off by {response['incomplete_details']['reason']}"]
    return []
