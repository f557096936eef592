"""Deltas merged for a reader that is behind: nothing lost, nothing out of order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chatserve.client.cursor import Cursor
from chatserve.protocol import events
from chatserve.protocol.codec import from_wire, to_wire
from chatserve.protocol.merging import MAX_MERGED_CHARS, merge_deltas


def log_of(pieces: list[str | None]) -> list[bytes]:
    """A log in which each text is a delta, and None begins another response."""
    wires, offset, response = [], 0, 0
    for seq, piece in enumerate(pieces, 1):
        if piece is None:
            offset, response = 0, response + 1
            event = events.response_resumed(response_id=f"r{response}", offset=0)
        else:
            event = events.output_text_delta(response_id=f"r{response}", offset=offset, delta=piece)
            offset += len(piece)
        wires.append(to_wire(events.stamp(event, "s", seq, 1000 + seq)))
    return wires


def texts_of(wires: list[bytes]) -> dict[str, str]:
    """Each response's text, checked against the offsets."""
    texts: dict[str, str] = {}
    for event in map(from_wire, wires):
        if "delta" in event:
            so_far = texts.get(event["response_id"], "")
            assert event["offset"] == len(so_far)
            texts[event["response_id"]] = so_far + event["delta"]
    return texts


@given(st.lists(st.none() | st.text(min_size=1, max_size=9), max_size=40))
def test_merged_events_say_the_same(pieces: list[str | None]) -> None:
    """A client applies every merged event, ends where the log ends, and has the same texts."""
    wires = log_of(pieces)
    merged = merge_deltas(wires)
    cursor = Cursor(epoch=1, seq=0)
    assert [cursor.judge(from_wire(wire)) for wire in merged] == ["apply"] * len(merged)
    assert cursor.seq == len(wires)
    assert texts_of(merged) == texts_of(wires)


def test_merged_delta_covers_its_run() -> None:
    """A run of deltas is one event from `seq_from` to `seq`, with the last one's time; others stay as they are."""
    merged = [from_wire(wire) for wire in merge_deltas(log_of([None, "a", "é", "c", None]))]
    assert [event["seq"] for event in merged] == [1, 4, 5]
    assert merged[1] == {
        "type": "response.output_text.delta",
        "response_id": "r1",
        "offset": 0,
        "delta": "aéc",
        "session_id": "s",
        "seq_from": 2,
        "seq": 4,
        "ts": 1004,
    }


def test_merged_delta_stays_small() -> None:
    """No merged delta is longer than the bound, and one that is longer by itself goes alone."""
    half, whole = "x" * (MAX_MERGED_CHARS // 2), "y" * (MAX_MERGED_CHARS + 1)
    merged = [from_wire(wire) for wire in merge_deltas(log_of([half, half, half, whole, "z"]))]
    assert [event["seq"] for event in merged] == [2, 3, 4, 5]
