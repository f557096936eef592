"""Runs of text deltas made one, for a reader that is behind: fewer messages, the same text, no event left out.

A merged delta covers `seq_from` to `seq`; a client applies it when `seq_from` is the event it waits for. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable

from chatserve.protocol.codec import from_wire, to_wire
from chatserve.protocol.events import Event

MAX_MERGED_CHARS = 1 << 14  # of one delta: what a reader on a slow line has to wait for as a whole
_DELTA = "response.output_text.delta"


def merge_deltas(wires: Iterable[bytes]) -> list[bytes]:
    """The events as the log has them, in order, with neighbouring deltas of one response joined."""
    merged: list[Event] = []
    for event in map(from_wire, wires):
        if merged and _continues(merged[-1], event):
            merged[-1] = _joined(merged[-1], event)
        else:
            merged.append(event)
    return [to_wire(event) for event in merged]


def _continues(before: Event, event: Event) -> bool:
    """Whether an event is the next piece of the text that the one before it ends in, and fits behind it."""
    return (
        before["type"] == event["type"] == _DELTA
        and before["response_id"] == event["response_id"]
        and before["offset"] + len(before["delta"]) == event["offset"]
        and len(before["delta"]) + len(event["delta"]) <= MAX_MERGED_CHARS
    )


def _joined(before: Event, event: Event) -> Event:
    """Both as one: from where the first began, as of the last."""
    first_seq = before.get("seq_from", before["seq"])
    return {**event, "seq_from": first_seq, "offset": before["offset"], "delta": before["delta"] + event["delta"]}
