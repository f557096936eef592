"""How `chatserve chat` looks: replies on standard output, everything else beside them.

On a terminal that is the same place, only dimmer; elsewhere remarks go to stderr, so that a pipe gets replies only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from chatserve.cli.text import printable

PROMPT = "you> "


class Screen:
    """Reads lines and writes replies. `interactive` when both ends are a terminal."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._out = Console(highlight=False, soft_wrap=True)
        self._remarks = self._out if self.interactive else Console(stderr=True, highlight=False, soft_wrap=True)

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
        name = "you" if role == "user" else role
        self._remarks.print(Text(f"{name}> ", style="bold") + Text(printable(text)))

    def reply_part(self, text: str) -> None:
        """The next piece of a reply."""
        self._out.print(Text(printable(text)), end="")

    def reply_end(self) -> None:
        """The reply is complete."""
        self._out.print()

    def remark(self, text: str) -> None:
        """Something about the conversation rather than in it."""
        self._remarks.print(Text(printable(text), style="dim"))

    def problem(self, text: str) -> None:
        """Something went wrong."""
        self._remarks.print(Text(printable(text), style="red"))

    def note(self, text: str) -> None:
        """Something that was asked for, such as a line of the list of sessions."""
        self._remarks.print(Text(printable(text)))


def describe_turn(response: Mapping[str, Any], max_context: int | None) -> str:
    """One line on how a turn ended, unless by itself, and what it cost."""
    usage, timings = response["usage"], response["timings"]
    cached = usage["input_tokens_details"]["cached_tokens"]
    parts = [
        *_ending(response),
        f"{cached:,} of {usage['input_tokens']:,} input tokens cached",
        f"first token {timings['ttft_ms']:,.0f} ms",
        f"{timings['tokens_per_second']:,.0f} tokens/s",
    ]
    if max_context:
        parts.append(f"{max(0, max_context - usage['total_tokens']):,} of {max_context:,} tokens left")
    return " · ".join(parts)


def _ending(response: Mapping[str, Any]) -> list[str]:
    if response["status"] == "cancelled":
        return ["stopped"]
    if response["status"] == "incomplete":
        return [f"cut off by {response['incomplete_details']['reason']}"]
    return []
