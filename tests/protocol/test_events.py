"""The shape of every event, and its two encodings."""

from __future__ import annotations

import json
from typing import Any

import msgpack
import pytest

from chatserve.errors import BadRequest
from chatserve.protocol import events
from chatserve.protocol.codec import encode, from_wire, to_wire, wire_to

USAGE = events.usage_object(input_tokens=10, output_tokens=2, cached_tokens={"device": 6, "disk": 1})
CACHE: events.Cache = {"result": "partial", "restored_from": "disk", "reason": None}
RESPONSE = events.response_object(
    response_id="r1", message_id="m2", parent_id="m1", model="bundled", status="completed", text="Hi", usage=USAGE
)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            events.welcome(
                connection_id="x", server={"name": "chatserve"}, limits={}, models=["m"], heartbeat_ms=15000
            ),
            {
                "type": "welcome",
                "connection_id": "x",
                "server": {"name": "chatserve"},
                "limits": {},
                "models": ["m"],
                "heartbeat_ms": 15000,
            },
        ),
        (
            events.ok("c1", response_id="r1", message_id=None, head_seq=0, duplicate=False),
            {"type": "ok", "id": "c1", "response_id": "r1", "head_seq": 0, "duplicate": False},
        ),
        (
            events.error(BadRequest("no", param="t").as_object(), command_id="c1"),
            {
                "type": "error",
                "id": "c1",
                "error": {
                    "type": "invalid_request_error",
                    "code": "invalid_value",
                    "message": "no",
                    "param": "t",
                    "retryable": False,
                },
            },
        ),
        (
            events.session_attached(session_id="s1", epoch=1, head_seq=0, mode="replay", command_id="c1"),
            {
                "type": "session.attached",
                "id": "c1",
                "session_id": "s1",
                "epoch": 1,
                "head_seq": 0,
                "mode": "replay",
            },
        ),
        (events.pong(t=1.5, server_ts=2), {"type": "pong", "t": 1.5, "server_ts": 2}),
        (
            events.goaway(reason="restart", time_left_ms=1, reconnect_after_ms=2),
            {"type": "goaway", "reason": "restart", "time_left_ms": 1, "reconnect_after_ms": 2},
        ),
        (events.sessions_changed(), {"type": "sessions.changed"}),
        (events.session_created({"id": "s1"}), {"type": "session.created", "session": {"id": "s1"}}),
        (events.session_updated({"id": "s1"}), {"type": "session.updated", "session": {"id": "s1"}}),
        (events.session_deleted(), {"type": "session.deleted"}),
        (
            events.message_created(
                events.message_object(message_id="m1", parent_id=None, role="user", text="Hi", created_at=5)
            ),
            {
                "type": "message.created",
                "message": {
                    "id": "m1",
                    "role": "user",
                    "content": [{"type": "text", "text": "Hi"}],
                    "created_at": 5,
                },
            },
        ),
        (
            events.response_in_progress(response_id="r1", usage=USAGE, queue_ms=1.5, cache=CACHE),
            {
                "type": "response.in_progress",
                "response_id": "r1",
                "usage": {
                    "input_tokens": 10,
                    "input_tokens_details": {"cached_tokens": 7},
                    "output_tokens": 2,
                    "total_tokens": 12,
                    "cached_tokens_details": {"device": 6, "host": 0, "disk": 1},
                },
                "queue_ms": 1.5,
                "cache": {"result": "partial", "restored_from": "disk", "reason": None},
            },
        ),
        (
            events.output_text_delta(response_id="r1", offset=2, delta="é"),
            {"type": "response.output_text.delta", "response_id": "r1", "offset": 2, "delta": "é"},
        ),
        (
            events.output_text_done(response_id="r1", text="né"),
            {"type": "response.output_text.done", "response_id": "r1", "text": "né"},
        ),
        (
            events.response_resumed(response_id="r1", offset=2),
            {"type": "response.resumed", "response_id": "r1", "offset": 2},
        ),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else None,
)
def test_an_event_has_the_fields_of_the_protocol(event: dict[str, Any], expected: dict[str, Any]) -> None:
    """Each event has the protocol's fields, None left out, and is the same after either encoding."""
    assert event == expected
    assert msgpack.unpackb(encode(event, "msgpack")) == expected
    assert json.loads(encode(event, "json")) == expected


def test_response_events_carry_the_response() -> None:
    """`created` and the four terminal events hold the response object under their own names."""
    builders = [
        events.response_completed,
        events.response_incomplete,
        events.response_cancelled,
        events.response_failed,
    ]
    assert {build(RESPONSE)["type"] for build in builders} == events.TERMINAL_EVENTS
    assert all(build(RESPONSE)["response"] == RESPONSE for build in [events.response_created, *builders])


def test_a_response_says_why_it_is_incomplete() -> None:
    """The reason stands in `incomplete_details`, and nothing that is unknown stands anywhere."""
    response = events.response_object(
        response_id="r1",
        message_id="m1",
        parent_id=None,
        model="bundled",
        status="incomplete",
        incomplete_reason="context_window",
    )
    assert response == {
        "id": "r1",
        "message_id": "m1",
        "model": "bundled",
        "status": "incomplete",
        "incomplete_details": {"reason": "context_window"},
    }


def test_more_cached_tokens_than_input_is_a_mistake() -> None:
    """Usage that contradicts itself is not sent."""
    with pytest.raises(ValueError, match="11 cached tokens of 10"):
        events.usage_object(input_tokens=10, output_tokens=0, cached_tokens={"device": 11})


def test_a_stamped_event_is_logged_sent_and_transcoded() -> None:
    """The log's bytes are the msgpack message; the JSON message says the same."""
    event = events.stamp(events.output_text_delta(response_id="r1", offset=0, delta="naïve 🙂"), "s1", 3, 1732)
    assert (event["session_id"], event["seq"], event["ts"]) == ("s1", 3, 1732)
    wire = to_wire(event)
    assert wire_to("msgpack", wire) is wire
    assert from_wire(wire) == event
    assert json.loads(wire_to("json", wire)) == event


def test_json_refuses_what_json_cannot_say() -> None:
    """A number that is none never reaches a client as invalid JSON."""
    with pytest.raises(ValueError, match="JSON compliant"):
        encode(events.pong(t=float("nan"), server_ts=1), "json")
