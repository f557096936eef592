"""The page's recorded logs, applied with the rule of `chatserve.client`: both clients come to the server's snapshot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatserve.client.cursor import Cursor
from chatserve.client.snapshot import branch, text_of

RECORDS = sorted((Path(__file__).parent / "data").glob("*.json"))


def texts(applied):
    """What each message says after these events, by its id."""
    said, messages = {}, {}
    for event in applied:
        kind = event["type"]
        if kind == "message.created":
            messages[event["message"]["id"]] = text_of(event["message"])
        elif kind == "response.output_text.delta":
            assert event["offset"] == len(said.get(event["response_id"], ""))
            said[event["response_id"]] = said.get(event["response_id"], "") + event["delta"]
        elif kind == "response.completed" or kind in ("response.incomplete", "response.cancelled"):
            assert said.get(event["response"]["id"], "") == event["response"]["text"]
            messages[event["response"]["message_id"]] = event["response"]["text"]
    return messages


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_recorded_log(path):
    """Repetitions are dropped, gaps are seen, and what is applied says what the snapshot says."""
    record = json.loads(path.read_text())
    cursor = Cursor(record["snapshot"]["epoch"], 0)
    assert [cursor.judge(each["event"]) for each in record["arrivals"]] == [
        each["verdict"] for each in record["arrivals"]
    ]
    assert {each["verdict"] for each in record["arrivals"]} == {"apply", "drop", "gap"}
    assert cursor.seq == record["snapshot"]["head_seq"]
    applied = [each["event"] for each in record["arrivals"] if each["verdict"] == "apply"]
    assert texts(applied) == {message["id"]: text_of(message) for message in record["snapshot"]["messages"]}
    assert all(message["id"] in texts(applied) for message in branch(record["snapshot"]))
