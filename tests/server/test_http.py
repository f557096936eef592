"""The HTTP endpoints, as tables of requests and answers."""

import socket

import pytest

from chatserve.errors import StartupError, Unavailable
from chatserve.server.listener import bind

KEY = {"Authorization": "Bearer alices-key"}


async def test_session_life(served):
    """Create, read, change, list, resume, delete: each with its status and body."""
    async with served.http() as http:
        created = await http.post("/v1/sessions", json={"title": "One"})
        session_id = created.json()["id"]
        assert (created.status_code, created.json()["title"]) == (201, "One")
        path = f"/v1/sessions/{session_id}"
        assert (await http.get(path)).json() == {**created.json(), "messages": []}
        assert (await http.patch(path, json={"title": "Two"})).json()["title"] == "Two"
        listed = (await http.get("/v1/sessions")).json()
        assert listed == {"object": "list", "data": [{**created.json(), "title": "Two"}], "has_more": False}
        resumed = (await http.post(f"{path}/resume", json={"epoch": 1, "after_seq": 0, "warm": True})).json()
        assert (resumed["head_seq"], resumed["warm"]) == (1, True)
        cache = (await http.get(f"{path}/cache")).json()
        assert (cache["tokens"], cache["device"], cache["disk"]) == (20, 12, 8)
        deleted = await http.delete(path)
        assert deleted.json() == {"id": session_id, "object": "session", "deleted": True}
        assert (await http.get(path)).status_code == 404


async def test_create_is_idempotent(served):
    """The same Idempotency-Key gives the same session, with 200 instead of 201."""
    async with served.http(headers={"Idempotency-Key": "once"}) as http:
        first, second = [await http.post("/v1/sessions") for _ in range(2)]
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()


async def test_list_pages(served):
    """`limit` cuts the list, `has_more` says so, `before` goes on."""
    async with served.http() as http:
        ids = [(await http.post("/v1/sessions")).json()["id"] for _ in range(3)]
        page = (await http.get("/v1/sessions", params={"limit": 2})).json()
        assert ([item["id"] for item in page["data"]], page["has_more"]) == (ids[:0:-1], True)
        rest = (await http.get("/v1/sessions", params={"limit": 2, "before": page["data"][-1]["id"]})).json()
        assert ([item["id"] for item in rest["data"]], rest["has_more"]) == (ids[:1], False)


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code"),
    [
        ("GET", "/v1/sessions/sess_none", {}, 404, "session_not_found"),
        ("DELETE", "/v1/sessions/sess_none", {}, 404, "session_not_found"),
        ("PATCH", "/v1/sessions/sess_none", {"json": {"title": "x"}}, 404, "session_not_found"),
        ("POST", "/v1/sessions/sess_none/resume", {}, 404, "session_not_found"),
        ("POST", "/v1/sessions", {"json": {"titel": "x"}}, 400, "invalid_value"),
        ("POST", "/v1/sessions", {"json": {"title": 5}}, 400, "invalid_value"),
        ("POST", "/v1/sessions", {"json": []}, 400, "bad_message"),
        ("POST", "/v1/sessions", {"content": b"{"}, 400, "bad_message"),
        ("POST", "/v1/sessions", {"content": b"\xff"}, 400, "bad_message"),
        ("POST", "/v1/sessions", {"content": b"[" * 100_000}, 400, "bad_message"),
        ("POST", "/v1/sessions", {"content": b" " * (1 << 20) + b"{}"}, 413, "message_too_large"),
        ("POST", "/v1/sessions/sess_none/resume", {"json": {"after_seq": -1}}, 400, "invalid_value"),
        ("POST", "/v1/sessions/sess_none/resume", {"json": {"after_seq": "1"}}, 400, "invalid_value"),
        ("POST", "/v1/sessions/sess_none/resume", {"json": {"cursor": 1}}, 400, "invalid_value"),
        ("GET", "/v1/sessions?limit=0", {}, 400, "invalid_value"),
        ("GET", f"/v1/sessions?search={'x' * 201}", {}, 400, "invalid_value"),
        ("GET", "/v1/sessions?limit=201", {}, 400, "invalid_value"),
        ("GET", "/v1/sessions?offset=1", {}, 400, "invalid_value"),
        ("GET", "/v1/nothing", {}, 404, "not_supported"),
        ("PUT", "/v1/sessions", {}, 405, "not_supported"),
        ("POST", "/v1/embeddings", {"json": {}}, 404, "not_supported"),
    ],
)
async def test_refused(served, method, path, options, status, code):
    """Every refusal has its status and the protocol's error object."""
    async with served.http() as http:
        response = await http.request(method, path, **options)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert {"type", "code", "message", "retryable"} <= set(error)


async def test_unavailable_store(served):
    """A refusal that may pass says when to try again."""
    async with served.http() as http:
        await http.post("/v1/sessions")
        served.sessions.fault = Unavailable("redis is away", retry_after_ms=1500)
        response = await http.get("/v1/sessions/sess_1")
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    assert response.json()["error"]["retryable"] is True


async def test_fault_of_ours(served):
    """A fault is answered with 500 and without its text."""
    async with served.http() as http:
        await http.post("/v1/sessions")
        served.sessions.fault = RuntimeError("secret inside")
        response = await http.get("/v1/sessions/sess_1")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("path", "open_to_all"),
    [
        ("/healthz", True),
        ("/readyz", True),
        ("/", True),
        ("/icon.svg", True),
        ("/version", False),
        ("/v1/models", False),
        ("/v1/sessions", False),
        ("/v1/sessions/sess_none", False),
    ],
)
async def test_key(serve, path, open_to_all):
    """With keys set, all but health and the page needs one."""
    served = await serve(api_keys=("alice=alices-key",))
    async with served.http() as http:
        without, wrong = await http.get(path), await http.get(path, headers={"Authorization": "Bearer nope"})
        right = await http.get(path, headers=KEY)
    assert (without.status_code, wrong.status_code) == ((200, 200) if open_to_all else (401, 401))
    assert right.status_code != 401
    if not open_to_all:
        assert without.headers["www-authenticate"] == "Bearer"
        assert without.json()["error"]["code"] == "unauthorized"


async def test_tenants_do_not_meet(serve):
    """One key's sessions do not exist for another, by list or by id."""
    served = await serve(api_keys=("alice=alices-key", "bob=bobs-key-2"))
    async with served.http(headers=KEY) as alice, served.http(headers={"Authorization": "Bearer bobs-key-2"}) as bob:
        session_id = (await alice.post("/v1/sessions")).json()["id"]
        assert (await bob.get("/v1/sessions")).json()["data"] == []
        for method in ("GET", "PATCH", "DELETE"):
            assert (await bob.request(method, f"/v1/sessions/{session_id}")).status_code == 404
        assert (await alice.get(f"/v1/sessions/{session_id}")).status_code == 200


async def test_readyz(served):
    """Ready only with an engine, a store that answers, and no shutdown under way."""
    async with served.http() as http:
        assert (await http.get("/readyz")).json() == {
            "ready": True,
            "checks": {"engine": True, "storage": True, "not_draining": True},
        }
        served.engine.ready = False
        assert (await http.get("/readyz")).status_code == 503
        served.engine.ready = True
        served.sessions.fault = Unavailable("redis is away")
        answer = await http.get("/readyz")
        assert (answer.status_code, answer.json()["checks"]["storage"]) == (503, False)
        served.sessions.fault = None
        served.services.hub.begin_drain(1.0)
        assert (await http.get("/readyz")).json()["checks"]["not_draining"] is False
        assert (await http.get("/healthz")).status_code == 200


async def test_models_and_version(served):
    """The model that is served, and what the engine found."""
    async with served.http() as http:
        models = (await http.get("/v1/models")).json()
        version = (await http.get("/version")).json()
    assert [model["id"] for model in models["data"]] == ["fake-model"]
    assert (version["model"], version["capacity_tokens"]) == ("fake-model", 100_000)


async def test_foreign_page_cannot_write(served):
    """A page of another site cannot make sessions here, with or without a preflight."""
    foreign = {"Origin": "http://evil.example", "Content-Type": "text/plain"}
    async with served.http(headers=foreign) as http:
        assert (await http.post("/v1/sessions", content=b"{}")).status_code == 403
        assert (await http.options("/v1/sessions")).status_code == 403
    assert not served.sessions.views


async def test_allowed_origin(serve):
    """A page that the operator allowed gets the headers that let it read answers."""
    served = await serve(allowed_origins=("https://chat.example.org",))
    async with served.http(headers={"Origin": "https://chat.example.org"}) as http:
        preflight = await http.options(
            "/v1/sessions",
            headers={"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"},
        )
        answer = await http.get("/v1/sessions")
    assert preflight.status_code == 200
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-origin"] == "https://chat.example.org"


async def test_bind_refuses_a_taken_port(served):
    """A taken port is a clear error before anything is loaded."""
    from_url = int(served.url.rpartition(":")[2])
    with pytest.raises(StartupError, match=f"port {from_url}.*--port"):
        bind("127.0.0.1", from_url)


def test_small_messages_are_not_delayed():
    """A listener says that it is TCP, without which asyncio leaves 40 ms of Nagle's delay on its connections."""
    with bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
