"""What a stranger tries: other tenants' sessions by every route and command, slow and oversized requests, log files."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import socket
import sys
import time
from contextlib import AsyncExitStack
from typing import Any, get_args

import pytest
from starlette.responses import Response
from starlette.routing import Route
from websockets.asyncio.client import connect

from chatserve.logs import NOISY_LOGGERS, configure_logging
from chatserve.protocol.codec import encode, from_wire
from chatserve.protocol.commands import Command
from chatserve.server.app import create_app
from chatserve.server.http_transport import HttpTransport
from chatserve.server.pages import page_routes
from chatserve.settings import load_settings
from tests.server.real import ALICE, BOB, KEYS, listening

HIDDEN = 404
OPEN = {("GET", "/healthz"), ("GET", "/readyz")} | {("GET", route.path) for route in page_routes()}
SAYS_NOTHING = None  # of a body
SESSION, RESPONSE = "/v1/sessions/{session_id}", "/v1/responses/{response_id}"
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}

# Every route that needs a key: what Bob sends to get at Alice's session, and the status he gets; None where the route
# is about nobody's session, and must only not tell of hers.
ROUTES: dict[tuple[str, str], tuple[dict[str, Any] | None, int | None]] = {
    ("GET", "/v1/sessions"): (SAYS_NOTHING, None),
    ("POST", "/v1/sessions"): ({"key": "alices-own-key"}, None),
    ("POST", "/v1/sessions/import"): ({}, None),
    ("GET", SESSION): (SAYS_NOTHING, HIDDEN),
    ("PATCH", SESSION): ({"title": "mine now"}, HIDDEN),
    ("DELETE", SESSION): (SAYS_NOTHING, HIDDEN),
    ("POST", f"{SESSION}/fork"): ({"at_message_id": "{message_id}"}, HIDDEN),
    ("POST", f"{SESSION}/resume"): ({"after_seq": 0, "warm": True}, HIDDEN),
    ("GET", f"{SESSION}/cache"): (SAYS_NOTHING, HIDDEN),
    ("GET", f"{SESSION}/export"): (SAYS_NOTHING, HIDDEN),
    ("GET", f"{SESSION}/events"): (SAYS_NOTHING, HIDDEN),
    ("POST", f"{SESSION}/responses"): ({"input": "Hello", "key": "alices-turn"}, HIDDEN),
    ("POST", f"{SESSION}/responses/{{inner_id}}/cancel"): (SAYS_NOTHING, HIDDEN),
    ("GET", "/v1/models"): (SAYS_NOTHING, None),
    ("GET", "/v1/models/fake"): (SAYS_NOTHING, None),
    ("POST", "/v1/completions"): ({"prompt": "<|im_start|>assistant\n", "max_tokens": 4}, None),
    ("POST", "/v1/chat/completions"): (CHAT, None),
    ("POST", "/v1/responses"): ({"model": "fake", "input": "Hi", "previous_response_id": "{response_id}"}, HIDDEN),
    ("GET", RESPONSE): (SAYS_NOTHING, HIDDEN),
    ("POST", f"{RESPONSE}/cancel"): (SAYS_NOTHING, HIDDEN),
    ("GET", f"{RESPONSE}/input_items"): (SAYS_NOTHING, HIDDEN),
    ("GET", "/metrics"): (SAYS_NOTHING, None),
    ("GET", "/version"): (SAYS_NOTHING, None),
    ("GET", "/openapi.json"): (SAYS_NOTHING, None),
    ("GET", "/v1/ws"): (SAYS_NOTHING, None),
}
AS_ROUTED = {"/v1/models/{model_id:path}": "/v1/models/fake", "{response_id}/cancel": "{inner_id}/cancel"}

# Every command: what Bob says about Alice's session. Those that are answered by nothing are followed by a ping.
COMMANDS: dict[str, dict[str, Any]] = {
    "hello": {},
    "session.create": {"key": "alices-own-key"},
    "session.attach": {"after_seq": 0},
    "session.detach": {},
    "session.update": {"title": "mine now"},
    "session.delete": {},
    "session.fork": {"at_message_id": "{message_id}", "key": "f"},
    "response.create": {"input": "Hello", "key": "alices-turn"},
    "response.cancel": {"response_id": "{inner_id}"},
    "session.typing": {},
    "ping": {"t": 1.0},
}
HARMLESS = {"hello": "invalid_value", "session.create": "ok", "session.detach": "ok", "ping": "pong"}


async def alices(http):
    """What Bob may have overheard: names of a session of Alice's and of what is in it."""
    session = (await http.post("/v1/sessions", json={"key": "alices-own-key", "title": "Secret plans"})).json()
    turn = await http.post(f"/v1/sessions/{session['id']}/responses", json={"input": "Hello", "key": "alices-turn"})
    stored = await http.post("/v1/responses", json={"model": "fake", "input": "Hello", "max_output_tokens": 16})
    return {
        "session_id": session["id"],
        "message_id": turn.json()["message_id"],
        "inner_id": turn.json()["response_id"],
        "response_id": stored.json()["id"],
    }


def filled(value, names):
    """A value with the names in its braces."""
    if isinstance(value, dict):
        return {name: filled(part, names) for name, part in value.items()}
    return value.format(**names) if isinstance(value, str) else value


def routed(services):
    """Method and path of every route that is open to HTTP, as the table above writes them."""
    for route in create_app(services).routes:
        if isinstance(route, Route):
            path = AS_ROUTED.get(route.path, route.path)
            if path.startswith(SESSION):
                path = path.replace("{response_id}", "{inner_id}")
            yield from ((method, path) for method in route.methods - {"HEAD"})


async def test_no_route_crosses_tenants(real):
    """By no route is another tenant's session read, changed or shown to be there; the table has every route."""
    async with real(api_keys=KEYS) as server, server.http(ALICE) as alice, server.http(BOB) as bob:
        assert set(routed(server.services)) - OPEN == set(ROUTES)
        names = await alices(alice)
        before = await alice.get(f"/v1/sessions/{names['session_id']}")
        for (method, path), (body, status) in ROUTES.items():
            answer = await bob.request(method, filled(path, names), json=filled(body, names))
            assert answer.status_code == status or status is None, (method, path, answer.text)
            for told in ("Secret plans", names["session_id"] if status is None else "Secret plans"):
                assert told not in answer.text, (method, path)
        assert (await alice.get(f"/v1/sessions/{names['session_id']}")).json() == before.json()
        missing = await bob.get("/v1/sessions/sess_none")
        hers = await bob.get(f"/v1/sessions/{names['session_id']}")
        assert hers.text.replace(names["session_id"], "sess_none") == missing.text


async def test_every_route_needs_a_key(real):
    """Without a key, or with a wrong one, each route of the table is 401 and those beside it are open."""
    async with real(api_keys=KEYS) as server, server.http() as nobody:
        names = dict.fromkeys(("session_id", "message_id", "inner_id", "response_id"), "x")
        for method, path in set(ROUTES) - {("GET", "/v1/ws")}:
            for headers in ({}, {"Authorization": "Bearer wrong-key"}, {"Authorization": "Basic YTpi"}):
                answer = await nobody.request(method, filled(path, names), headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized"), (method, path)
        for method, path in OPEN:
            assert (await nobody.request(method, path)).status_code == 200


async def test_no_command_crosses_tenants(real):
    """By no command is another tenant's session reached, nor by `hello.resume`; the table has every command."""
    assert set(COMMANDS) == {cls.__dataclass_fields__["type"].default for cls in get_args(Command)}
    async with real(api_keys=KEYS) as server, server.http(ALICE) as alice:
        names = await alices(alice)
        before = (await alice.get(f"/v1/sessions/{names['session_id']}")).json()
        address = server.url.replace("http", "ws", 1) + "/v1/ws"
        async with connect(address, subprotocols=["chatserve.v1.msgpack"], proxy=None) as socket:
            peer = Stranger(socket)
            resume = [{"session_id": names["session_id"], "epoch": before["epoch"], "after_seq": 0}]
            welcome = await peer.ask(type="hello", client=BOBS, token="bobs-key-2", resume=resume)
            assert welcome["type"] == "welcome"
            assert (await peer.hear())["error"]["code"] == "session_not_found"
            for name, fields in COMMANDS.items():
                answer = await peer.ask(**command(name, filled(fields, names), names["session_id"]))
                verdict = answer["error"]["code"] if answer["type"] == "error" else answer["type"]
                assert verdict == HARMLESS.get(name, "session_not_found"), name
                assert "Secret plans" not in json.dumps(answer)
                assert name != "session.create" or answer["session"]["id"] != names["session_id"]
        assert (await alice.get(f"/v1/sessions/{names['session_id']}")).json() == before


BOBS = {"name": "bob", "version": "1"}


def command(name, fields, session_id):
    """The command with what every command of its kind carries."""
    if name == "hello":
        return {"type": name, "client": BOBS}
    own = {} if name in ("session.create", "ping") else {"session_id": session_id}
    return {"type": name, "id": "c1", **own, **fields}


class Stranger:
    """A WebSocket client that says what it is told to."""

    def __init__(self, socket):
        self._socket = socket

    async def ask(self, **fields):
        await self._socket.send(encode(fields, "msgpack"))
        return await self.hear()

    async def hear(self):
        while (event := from_wire(await asyncio.wait_for(self._socket.recv(), 5)))["type"] == "sessions.changed":
            pass
        return event


async def test_shared_beginnings_are_not_shared_between_tenants(real):
    """The engine is told whose each request is, also where the text is the same."""
    async with real(api_keys=KEYS) as server, server.http(ALICE) as alice, server.http(BOB) as bob:
        for http in (alice, bob):
            path = f"/v1/sessions/{(await http.post('/v1/sessions')).json()['id']}"
            await http.post(f"{path}/responses", json={"input": "Hello"})
        assert [request.tenant for request in server.engine.requests] == ["alice", "bob"]


@pytest.mark.parametrize("path", ["/v1/sessions", "/v1/sessions/x/events", "/v1/sessions/x/export", "/healthz", "/"])
@pytest.mark.parametrize(
    "headers", [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}], ids=str
)
async def test_foreign_pages(real, path, headers):
    """A page of another site, or one whose name was rebound to us, is refused before anything looks at its request."""
    async with real() as server, server.http() as http:
        answer = await http.get(path, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/static/../../pyproject.toml",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/app.js/../../settings.py",
        "/v1/sessions/..%2f..%2fetc/export",
        "/v1/sessions/%00/export",
        "/v1/sessions/" + "x" * 5000 + "/export",
        "/v1/sessions/x/responses/" + "x" * 5000 + "/cancel",
        "/v1/sessions/{x}:meta",
        "/v1/sessions/*",
    ],
)
async def test_paths_lead_nowhere(real, path):
    """No path leaves what is served, whatever it is made of, and the answer does not grow with it."""
    method, ending = "POST" if path.endswith("/cancel") else "GET", "Host: 127.0.0.1\r\nConnection: close\r\n\r\n"
    async with real() as server:
        answer = await raw(server.url, f"{method} {path} HTTP/1.1\r\n{ending}".encode())
    assert b" 404 " in answer.splitlines()[0]
    assert b"root:" not in answer
    assert len(answer) < 1000


async def raw(url, data, timeout_s=5.0):
    """What a server answers to these bytes until it closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(), timeout_s)
    finally:
        writer.close()


SLOW = {
    "nothing": b"",
    "half a request line": b"GET /heal",
    "half a header": b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: ",
    "half a handshake": b"GET /v1/ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n",
    "half a second request": b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /heal",
}


@pytest.mark.parametrize("opening", SLOW, ids=str)
async def test_slow_heads(real, monkeypatch, opening):
    """A connection that sends its head a byte at a time is closed in time, however often a byte comes."""
    monkeypatch.setattr(HttpTransport, "head_timeout_s", 0.3)
    async with real() as server:
        host, port = server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(SLOW[opening])
        began_s = asyncio.get_running_loop().time()
        dripping = asyncio.create_task(drip(writer))
        try:
            await asyncio.wait_for(read_all(reader), 5)
        finally:
            dripping.cancel()
            await asyncio.gather(dripping, return_exceptions=True)
            writer.close()
        assert asyncio.get_running_loop().time() - began_s >= 0.25


async def drip(writer):
    while True:
        await asyncio.sleep(0.05)
        writer.write(b"x")


async def read_all(reader):
    try:
        return await reader.read()
    except ConnectionError:
        return b""


async def test_quick_heads_are_not_cut(real, monkeypatch):
    """The bound is on heads alone: a kept connection, a long answer and a WebSocket outlive it."""
    monkeypatch.setattr(HttpTransport, "head_timeout_s", 0.1)
    async with real() as server, server.http() as http:
        path = f"/v1/sessions/{(await http.post('/v1/sessions')).json()['id']}"
        async with http.stream("GET", f"{path}/events") as stream:
            address = server.url.replace("http", "ws", 1) + "/v1/ws"
            async with connect(address, subprotocols=["chatserve.v1.json"], proxy=None) as peer:
                await asyncio.sleep(0.3)
                await peer.send(json.dumps({"type": "hello", "client": BOBS}))
                assert json.loads(await peer.recv())["type"] == "welcome"
            assert "session.attached" in (await anext(stream.aiter_text()))
        assert (await http.get("/healthz")).status_code == 200


@pytest.mark.parametrize(("wait_s", "is_whole"), [(0.0, True), (1.0, False)])
async def test_unread_answers(monkeypatch, wait_s, is_whole):
    """An answer that is read slowly arrives whole; one that is not read at all is given up, with its connection."""
    monkeypatch.setattr(HttpTransport, "stall_timeout_s", 0.3)
    large = b"x" * (16 << 20)
    async with AsyncExitStack() as stack:
        host, port = (await listening(stack, Response(large), load_settings())).removeprefix("http://").split(":")
        read = asyncio.get_running_loop().run_in_executor(None, _read_slowly, host, int(port), wait_s)
        assert ((await read) > len(large)) is is_whole


def _read_slowly(host, port, wait_s):
    """How many bytes come, to a reader that begins late and takes more than a second."""
    num_bytes = 0
    with socket.socket() as client, contextlib.suppress(ConnectionError):
        client.settimeout(5)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        client.connect((host, port))
        client.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        time.sleep(wait_s)
        while part := client.recv(1 << 16):
            num_bytes += len(part)
            time.sleep(0.004)
    return num_bytes


async def test_slow_body(real, monkeypatch):
    """A body that does not come is answered with 408 instead of being waited for."""
    monkeypatch.setattr("chatserve.server.http.BODY_GRACE_S", -15.8)  # of a limit that allows 16 s
    head = b"POST /v1/sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: 100\r\n\r\n{"
    async with real() as server:
        answer = await raw(server.url, head)
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_oversized(real):
    """Heads and bodies past their bounds are refused while they arrive, with and without a length."""
    start = b"POST /v1/sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    chunked = start + b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b"x" * 0x10000 + b"\r\n") * 20
    whole = start + b"Content-Length: 2000000\r\n\r\n" + b"x" * 2_000_000
    header = start + b"X-Long: " + b"x" * 100_000
    async with real() as server:
        for sent, status in ((chunked, b" 413 "), (whole, b" 413 "), (header, b" 400 ")):
            assert status in (await raw_until_reset(server.url, sent)).splitlines()[0]


async def raw_until_reset(url, data):
    """As `raw`, where the server may close while we send; what it answered is read all the same."""
    host, port = url.removeprefix("http://").split(":")
    loop = asyncio.get_running_loop()
    with socket.create_connection((host, int(port))) as client:
        client.settimeout(5)
        return await loop.run_in_executor(None, _exchange, client, data)


def _exchange(client, data):
    answer = b""
    with contextlib.suppress(OSError):  # it has answered
        client.sendall(data)
    with contextlib.suppress(OSError):
        while part := client.recv(1 << 16):
            answer += part
    return answer


@pytest.fixture
def debug_log(monkeypatch):
    """Everything is logged as `--log-level debug` does; gives what reads the log so far."""
    root, stderr = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", stderr)
    configure_logging("debug", "json")
    yield stderr.getvalue
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.NOTSET)


async def test_no_secret_in_logs(real, debug_log):
    """Whatever is asked, well or badly, the most talkative log has neither keys nor what was said."""
    secret, prompt = "wrong-but-secret", "my dog is called Zorp"
    async with real(api_keys=KEYS) as server, server.http(ALICE) as alice:
        path = f"/v1/sessions/{(await alice.post('/v1/sessions', json={'title': prompt})).json()['id']}"
        await alice.post(f"{path}/responses", json={"input": prompt})
        await alice.post(f"{path}/responses", json={"input": prompt, "temperature": prompt})
        await alice.post("/v1/chat/completions", json=CHAT)
        await alice.get(f"{path}/export")
        await alice.post("/v1/sessions/import", content=prompt.encode())
        await alice.get("/v1/sessions", headers={"Authorization": f"Bearer {secret}"})
        await raw(server.url, f"GET / HTTP/1.1\r\nAuthorization: Bearer {secret}\r\n\x00bad\r\n\r\n".encode())
        address = server.url.replace("http", "ws", 1) + "/v1/ws"
        async with connect(address, subprotocols=["chatserve.v1.json"], proxy=None) as socket:
            await socket.send(json.dumps({"type": "hello", "client": BOBS, "token": secret}))
            assert json.loads(await socket.recv())["error"]["code"] == "unauthorized"
        async with connect(address, subprotocols=["chatserve.v1.json"], proxy=None) as socket:
            await socket.send(json.dumps(prompt))
            assert json.loads(await socket.recv())["error"]["code"] == "bad_message"
            await socket.wait_closed()
        logged = [line for line in debug_log().split("\n") if line and not is_of_a_client(line)]
    assert any("response completed" in line for line in logged)
    for line in logged:
        assert not any(hidden in line for hidden in (secret, prompt, "alices-key", "bobs-key-2", "Well said")), line


def is_of_a_client(line):
    """Whether the line comes from a client's library, which runs in this process too."""
    return json.loads(line)["logger"].startswith(("httpx", "httpcore"))
