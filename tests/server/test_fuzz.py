"""Malformed and random messages at a real server: an answer or a close code, no fault, no hang, no lost session."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from typing import Any

import httpx
import msgpack
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from chatserve.protocol.reference import ERROR_CODES
from tests.live import LiveServer

BATCH = 25
PATIENCE_S = 20.0
FOR_CAUSE = frozenset({1007, 1009, 4400})  # what a server may close with for the messages made here
MAX_GROWTH_BYTES = 24 << 20
KEPT, VICTIM = "kept", "victim"
HELLO = {"type": "hello", "client": {"name": "fuzz", "version": "1"}}
TARGET = {"id": "c", "session_id": VICTIM}
COMMANDS: list[dict[str, Any]] = [
    HELLO,
    {"type": "session.create", "id": "c", "key": "k", "title": "t", "params": {"temperature": 1.0, "stop": "x"}},
    {"type": "session.attach", **TARGET, "after_seq": 0, "epoch": 1},
    {"type": "session.detach", **TARGET},
    {"type": "session.update", **TARGET, "title": "t", "metadata": {"a": "b"}, "head_id": "msg", "pinned": True},
    {"type": "session.delete", "id": "c", "session_id": "sess_none"},
    {"type": "session.fork", **TARGET, "at_message_id": "msg", "key": "k"},
    {"type": "response.create", **TARGET, "key": "k", "input": "Hi!", "max_output_tokens": 3},
    {"type": "response.create", **TARGET, "key": "k", "input": [{"type": "token_ids", "token_ids": [5, 6]}]},
    {"type": "response.cancel", **TARGET, "response_id": "resp"},
    {"type": "session.typing", "session_id": VICTIM},
    {"type": "ping", "t": 1.0},
]
_marks = itertools.count(1)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.binary(max_size=30)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def commands(draw: st.DrawFn) -> dict[str, Any]:
    """A command with some fields as they should be, others missing, strange, or of another command."""
    command = dict(draw(st.sampled_from(COMMANDS)))
    for name in draw(st.lists(st.sampled_from(sorted(command)), max_size=3)):
        command.pop(name, None)
        if draw(st.booleans()):
            command[name] = draw(junk)
    if draw(st.integers(0, 5)) == 0:
        command[draw(st.text(max_size=8))] = draw(junk)
    return command


def packed(value: Any, encoding: str) -> bytes | str:
    """The value in an encoding, as far as that has a word for it."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return json.dumps(value) if encoding == "json" else bytes(msgpack.packb(value))
    return repr(value) if encoding == "json" else repr(value).encode("utf-8", "replace")


@st.composite
def damaged(draw: st.DrawFn, encoding: str) -> bytes | str:
    """A command whose encoding was cut, doubled, or changed somewhere."""
    whole = packed(draw(st.sampled_from(COMMANDS)), encoding)
    at = draw(st.integers(0, len(whole)))
    if isinstance(whole, str):
        return draw(st.sampled_from([whole[:at], whole + whole, whole[:at] + draw(st.text(max_size=3)) + whole[at:]]))
    return draw(
        st.sampled_from([whole[:at], whole + whole, whole[:at] + draw(st.binary(max_size=3)) + whole[at + 1 :]])
    )


def messages(encoding: str) -> st.SearchStrategy[bytes | str]:
    """Anything that may arrive on a connection of an encoding."""
    raw = st.text(max_size=60) if encoding == "json" else st.binary(max_size=60)
    wrong = st.binary(max_size=9) if encoding == "json" else st.text(max_size=9)
    well_formed = (commands() | commands() | junk).map(lambda value: packed(value, encoding))
    return well_formed | well_formed | damaged(encoding) | raw | wrong


class Fuzzer:
    """Sends messages to a server over one connection after another, and reads all that comes back."""

    def __init__(self, server: LiveServer, encoding: str) -> None:
        self.num_sent = 0
        self.closed: Counter[int] = Counter()
        self._server = server
        self._encoding = encoding
        self._log_start = server.log.stat().st_size
        self._client = httpx.Client(base_url=server.url, trust_env=False)
        self._ids = {
            name: self._client.post("/v1/sessions", json={"title": name}).json()["id"] for name in (KEPT, VICTIM)
        }
        self._kept = self._client.get(f"/v1/sessions/{self._ids[KEPT]}").json()
        self._lines = contextlib.ExitStack()
        self._socket: ClientConnection | None = None

    def send(self, message: bytes | str) -> None:
        """One message, and a good one behind it: that is answered, or the connection was closed for cause."""
        self.num_sent += 1
        socket = self._socket or self._connect()
        try:
            socket.send(self._aimed(message))
            self._read_on(socket)
        except ConnectionClosed as end:
            code = end.rcvd.code if end.rcvd else 1006
            self._lines.close()
            self._socket = None
            self.closed[code] += 1

    def check(self) -> None:
        """No fault was logged, and the session that nobody spoke of is as it was."""
        with self._server.log.open("rb") as log:
            log.seek(self._log_start)
            said = log.read().decode(errors="replace")
        assert "Traceback" not in said
        assert " ERROR " not in said
        assert self._client.get(f"/v1/sessions/{self._ids[KEPT]}").json() == self._kept
        assert self._client.get("/readyz").status_code == 200

    def close(self) -> None:
        """Leave."""
        self._lines.close()
        self._client.close()

    def resident_bytes(self) -> int:
        """Memory of the server's front end."""
        return psutil.Process(self._server.process.pid).memory_info().rss

    def _connect(self) -> ClientConnection:
        url = self._server.url.replace("http", "ws", 1) + "/v1/ws"
        subprotocol: Any = f"chatserve.v1.{self._encoding}"
        options: Any = {"proxy": None, "ping_interval": None, "close_timeout": 1}
        self._socket = self._lines.enter_context(connect(url, subprotocols=[subprotocol], **options))
        self._socket.send(packed(HELLO, self._encoding))
        assert self._read(self._socket)["type"] == "welcome"
        return self._socket

    def _aimed(self, message: bytes | str) -> bytes | str:
        """The message with the victim's id in the place of its name."""
        session_id = self._ids[VICTIM]
        if isinstance(message, str):
            return message.replace(f'"{VICTIM}"', f'"{session_id}"')
        return message.replace(msgpack.packb(VICTIM), msgpack.packb(session_id))

    def _read_on(self, socket: ClientConnection) -> None:
        mark = f"mark-{next(_marks)}"
        socket.send(packed({"type": "session.detach", "id": mark, "session_id": "sess_none"}, self._encoding))
        while (event := self._read(socket)).get("id") != mark:
            if event["type"] == "error":
                assert event["error"]["code"] in ERROR_CODES
                assert event["error"]["code"] != "internal_error", event

    def _read(self, socket: ClientConnection) -> dict[str, Any]:
        data = socket.recv(timeout=PATIENCE_S)
        event: dict[str, Any] = json.loads(data) if isinstance(data, str) else msgpack.unpackb(data)
        return event


def fuzz(server: LiveServer, encoding: str, num_messages: int) -> Fuzzer:
    """Send so many messages; memory is measured behind the first quarter and at the end."""
    fuzzer, sizes = Fuzzer(server, encoding), []

    @settings(
        max_examples=num_messages // BATCH,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(messages(encoding), min_size=BATCH, max_size=BATCH))
    def run(batch: list[bytes | str]) -> None:
        for message in batch:
            fuzzer.send(message)
        if fuzzer.num_sent % 500 < BATCH:
            sizes.append(fuzzer.resident_bytes())

    try:
        run()
        fuzzer.check()
    finally:
        fuzzer.close()
    assert set(fuzzer.closed) <= FOR_CAUSE
    assert sizes[-1] - sizes[len(sizes) // 4] < MAX_GROWTH_BYTES
    return fuzzer


@pytest.mark.parametrize("encoding", ["msgpack", "json"])
def test_no_message_does_harm(live_server: LiveServer, encoding: str) -> None:
    """Some thousand messages: each answered or the connection closed for cause, nothing logged as a fault."""
    fuzzer = fuzz(live_server, encoding, 1000)
    assert fuzzer.num_sent >= 1000
    assert fuzzer.closed.total() > 50


@pytest.mark.soak
@pytest.mark.parametrize("encoding", ["msgpack", "json"])
def test_no_message_does_harm_for_long(live_server: LiveServer, encoding: str) -> None:
    """A hundred thousand in both encodings together, and memory stays flat."""
    assert fuzz(live_server, encoding, 50_000).num_sent >= 50_000
