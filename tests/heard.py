"""What a client applied of one session, with every promise of the log checked on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from chatserve.client import Patience
from chatserve.protocol.events import TERMINAL_EVENTS

QUICK = Patience(reply_quiet_s=0.2, pong_s=0.3, quiet_s=0.5, first_backoff_s=0.02, max_backoff_s=0.1)


@dataclass
class Heard:
    """Events by seq, from 1 or from behind the last snapshot on; the text of the present reply; its terminal event."""

    seqs: list[int] = field(default_factory=list)
    text: str = ""
    end: dict[str, Any] = field(default_factory=dict)
    head_seq: int = 0
    epoch: int = 0

    def apply(self, event: dict[str, Any]) -> None:
        """One event of the session: the next one, and the next piece of the text."""
        assert event.get("seq_from", event["seq"]) == self.head_seq + 1
        self.seqs += range(self.head_seq + 1, event["seq"] + 1)
        self.head_seq = event["seq"]
        if event["type"] == "response.created":
            self.text, self.end = "", {}
        if event["type"] == "response.output_text.delta":
            assert event["offset"] == len(self.text)
            self.text += event["delta"]
        if event["type"] in TERMINAL_EVENTS:
            assert not self.end
            assert event["response"]["text"] == self.text
            self.end = event

    def start_over(self, attached: dict[str, Any]) -> None:
        """A snapshot: the log is another one now, and the reply stands where it says."""
        assert attached["epoch"] > self.epoch
        self.epoch, self.head_seq, self.seqs, self.end = attached["epoch"], attached["head_seq"], [], {}
        messages = {message["id"]: message for message in attached["snapshot"]["messages"]}
        head = messages[attached["snapshot"]["head_id"]]
        self.text = head["content"][0]["text"]
        if not attached["snapshot"]["active_response"]:
            self.end = head
