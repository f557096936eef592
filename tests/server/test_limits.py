"""What one tenant may use: budgets as pure arithmetic, then refusals on every surface of a real server."""

import asyncio
import json
from contextlib import ExitStack

import pytest
from websockets.asyncio.client import connect

from chatserve.api_keys import TenantLimits
from chatserve.errors import Overloaded
from chatserve.server.limits import MAX_RETRY_MS, TokenBudget, TurnLimiter
from chatserve.server.services import MAX_IMPORTS_OF_ONE, MAX_SEARCHES_OF_ONE
from tests.server.real import ALICE, BOB, KEYS


class Clock:
    """Time that a test moves."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def limiter(limits=None, *, max_turns=100, **defaults):
    return TurnLimiter(limits or {}, TenantLimits(**defaults), max_turns=max_turns, clock=Clock())


def test_budget_refills():
    """A minute's tokens may be spent at once; debt is paid at the rate, and no more than a minute's worth is saved."""
    budget = TokenBudget(600, 0.0)
    budget.charge(600, 0.0)
    assert budget.wait_s(0.0) == pytest.approx(0.1)
    budget.charge(300, 0.0)
    assert budget.wait_s(0.0) == pytest.approx(30.1)
    assert budget.wait_s(30.0) == pytest.approx(0.1)
    assert budget.wait_s(31.0) == 0.0
    budget.charge(600, 10_000.0)
    assert budget.wait_s(10_000.0) > 0


def refusal(limiter, tenant):
    """The code that a turn is refused with, if it is."""
    try:
        limiter.leave(tenant, limiter.enter(tenant))
    except Overloaded as error:
        return error.code if 0 < error.retry_after_ms <= MAX_RETRY_MS else "no time to retry"
    return None


def test_turns_of_a_tenant():
    """A tenant's own limit stands beside the default of the others; a turn that ends makes room."""
    limits = limiter({"alice": TenantLimits(turns=1)}, turns=2)
    began = limits.enter("alice")
    assert refusal(limits, "alice") == "rate_limited"
    limits.enter("bob")
    assert refusal(limits, "bob") is None
    limits.enter("bob")
    assert refusal(limits, "bob") == "rate_limited"
    limits.leave("alice", began)
    assert refusal(limits, "alice") is None


def test_one_tenant_cannot_fill_the_server():
    """Of several tenants one may have half of all turns; a lone one may have all."""
    several = limiter({"alice": TenantLimits(), "bob": TenantLimits()}, max_turns=4)
    for _ in range(2):
        several.enter("alice")
    assert refusal(several, "alice") == "queue_full"
    assert refusal(several, "bob") is None
    alone = limiter(max_turns=4)
    for _ in range(4):
        alone.enter("local")
    assert refusal(alone, "local") == "queue_full"


def test_retry_follows_how_long_turns_take():
    """The time to wait grows with the turns' own length."""
    limits = limiter(max_turns=1)
    for _ in range(50):
        began = limits.enter("t")
        limits._clock.now_s += 8.0
        limits.leave("t", began)
    limits.enter("t")
    with pytest.raises(Overloaded) as caught:
        limits.enter("t")
    assert 7000 < caught.value.retry_after_ms <= 8000


async def session_path(http):
    return f"/v1/sessions/{(await http.post('/v1/sessions')).json()['id']}"


def assert_limited(answer, code):
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, code)
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["retry_after_ms"] > 0


async def running(server, num_requests):
    """Wait until the engine has so many requests."""
    async with asyncio.timeout(5):
        while len(server.engine.requests) < num_requests:
            await asyncio.sleep(0.01)


async def test_turn_is_refused_before_it_is_stored(real):
    """Past its limit a key's turn gets 429, leaves nothing behind, and the same command is taken later."""
    async with real(gated=True, api_keys=KEYS, key_max_turns=1) as server:
        alice, bob = server.http(ALICE), server.http(BOB)
        async with alice, bob:
            first, second = await session_path(alice), await session_path(alice)
            asked = asyncio.create_task(alice.post(f"{first}/responses", json={"input": "Hello"}))
            await running(server, 1)
            turn = {"json": {"input": "Hello", "key": "again"}}
            assert_limited(await alice.post(f"{second}/responses", **turn), "rate_limited")
            assert (await alice.get(second)).json()["messages"] == []
            completion = {"prompt": "<|im_start|>assistant\n", "max_tokens": 1}
            assert_limited(await alice.post("/v1/completions", json=completion), "rate_limited")
            other = asyncio.create_task(bob.post("/v1/completions", json=completion))
            await running(server, 2)
            server.engine.allow(200)
            assert (await asked).json()["response"]["status"] == "completed"
            assert (await other).status_code == 200
            assert (await alice.post(f"{second}/responses", **turn)).json()["response"]["status"] == "completed"


async def test_tokens_a_minute(real):
    """A key that has used its tokens waits; what the cache held cost it nothing."""
    async with real(api_keys=KEYS, key_tokens_per_minute=40) as server, server.http(ALICE) as http:
        path = await session_path(http)
        first = await http.post(f"{path}/responses", json={"input": "Hello"})
        assert first.json()["response"]["usage"]["total_tokens"] > 20
        answers = [await http.post(f"{path}/responses", json={"input": "Hello"}) for _ in range(3)]
        assert_limited(answers[-1], "rate_limited")


async def test_server_is_full(real):
    """Past what may run and wait in all, `queue_full` at once instead of a longer wait."""
    async with real(gated=True, max_waiting=1) as server, server.http() as http:
        limiter = server.services.sessions._engine._limiter
        limiter._max_turns = limiter._max_share = 2
        paths = [await session_path(http) for _ in range(3)]
        asked = [asyncio.create_task(http.post(f"{path}/responses", json={"input": "Hi"})) for path in paths[:2]]
        await running(server, 2)
        assert_limited(await http.post(f"{paths[2]}/responses", json={"input": "Hi"}), "queue_full")
        server.engine.allow(200)
        assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200, 200]
        assert not limiter._turns


async def test_sessions_of_a_key(real):
    """A key has so many sessions, made in any way; a repeated command is no further one, a deleted one makes room."""
    async with real(api_keys=KEYS, key_max_sessions=2) as server:
        alice, bob = server.http(ALICE), server.http(BOB)
        async with alice, bob:
            path = await session_path(alice)
            turn = (await alice.post(f"{path}/responses", json={"input": "Hello"})).json()
            document = (await alice.get(f"{path}/export")).json()
            kept = {"json": {"key": "kept"}}
            assert (await alice.post("/v1/sessions", **kept)).status_code == 201
            fork = {"at_message_id": turn["message_id"]}
            for answer in (
                await alice.post("/v1/sessions"),
                await alice.post(f"{path}/fork", json=fork),
                await alice.post("/v1/sessions/import", json=document),
            ):
                assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limited")
                assert answer.json()["error"]["retryable"] is False
            assert (await alice.post("/v1/sessions", **kept)).status_code == 200
            assert (await bob.post("/v1/sessions")).status_code == 201
            await alice.delete(path)
            assert (await alice.post("/v1/sessions/import", json=document)).status_code == 201


async def test_a_turn_that_is_never_begun_is_not_counted(real):
    """A refused or repeated command gives its place back, however early it ends."""
    async with real() as server, server.http() as http:
        path = await session_path(http)
        for _ in range(3):
            await http.post(f"{path}/responses", json={"input": "Hello", "key": "same"})
        await asyncio.gather(
            *(http.post(f"{path}/responses", json={"input": "Hi", "key": f"k{number}"}) for number in range(8))
        )
        async with asyncio.timeout(5):
            while server.services.sessions.num_running:
                await asyncio.sleep(0.01)
        assert not server.services.sessions._engine._limiter._turns


async def test_searches_at_a_time(real):
    """A tenant who searches already is asked to wait, others are not, and neither is who only lists."""
    async with real(api_keys=KEYS) as server, server.http(ALICE) as alice, server.http(BOB) as bob:
        with ExitStack() as busy:
            for _ in range(MAX_SEARCHES_OF_ONE):
                busy.enter_context(server.services.searches.taken("alice"))
            assert_limited(await alice.get("/v1/sessions?search=word"), "queue_full")
            assert (await alice.get("/v1/sessions?search=")).status_code == 200
            assert (await bob.get("/v1/sessions?search=word")).status_code == 200
        assert (await alice.get("/v1/sessions?search=word")).status_code == 200


async def test_imports_at_a_time(real):
    """A tenant whose imports are still arriving gets no further one, others do; when one has ended there is room."""
    async with real(api_keys=KEYS) as server, server.http(ALICE) as alice, server.http(BOB) as bob:
        document = (await alice.get(f"{await session_path(alice)}/export")).content
        host, port = server.url.removeprefix("http://").split(":")
        head = f"POST /v1/sessions/import HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer alices-key\r\n"
        writers = []
        for _ in range(MAX_IMPORTS_OF_ONE):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"{head}Content-Length: {len(document)}\r\n\r\n".encode())
            writers.append(writer)
        async with asyncio.timeout(5):
            while server.services.imports._taken["alice"] < MAX_IMPORTS_OF_ONE:
                await asyncio.sleep(0.01)
        assert_limited(await alice.post("/v1/sessions/import", content=document), "queue_full")
        assert (await bob.post("/v1/sessions/import", content=document)).status_code == 201
        for writer in writers:
            writer.write(document)
        async with asyncio.timeout(5):
            while server.services.imports._taken["alice"]:
                await asyncio.sleep(0.01)
        assert (await alice.post("/v1/sessions/import", content=document)).status_code == 201
        for writer in writers:
            writer.close()


async def test_limits_hold_on_a_websocket(real):
    """A command past a limit is answered with the same error, and with when to try again."""
    async with real(gated=True, key_max_turns=1) as server, server.http() as http:
        ids = [(await session_path(http)).rpartition("/")[2] for _ in range(2)]
        address = server.url.replace("http", "ws", 1) + "/v1/ws"
        async with connect(address, subprotocols=["chatserve.v1.json"], proxy=None) as socket:
            await socket.send(json.dumps({"type": "hello", "client": {"name": "t", "version": "1"}}))
            for number, session_id in enumerate(ids):
                turn = {"type": "response.create", "id": f"c{number}", "session_id": session_id, "key": "k"}
                await socket.send(json.dumps({**turn, "input": "Hello"}))
            answers = [json.loads(await asyncio.wait_for(socket.recv(), 5)) for _ in range(3)]
        assert [answer["type"] for answer in answers] == ["welcome", "ok", "error"]
        error = answers[2]["error"]
        assert (error["code"], error["retryable"], error["retry_after_ms"] > 0) == ("rate_limited", True, True)
        server.engine.allow(100)
