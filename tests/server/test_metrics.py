"""`/metrics`: finished responses are counted, the store is shown, and a server without an engine answers too."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from chatserve.errors import Unavailable
from chatserve.protocol import events
from chatserve.server.metrics import Metrics
from tests.server.conftest import Peer
from tests.server.fakes import TIMINGS, FakeEngine

STATS = {
    "page_bytes": 1 << 16, "token_bytes": 1 << 10, "budget_bytes": 1 << 20, "held_bytes": 1 << 19, "num_sessions": 3,
    "pages": {"free": 1, "private": 2, "indexed": 5, "guard": 0}, "evicted_tokens": 4, "failed_pages": 1,
    "host_bytes": 1 << 17, "host_budget_bytes": 1 << 19, "disk_bytes": 0, "disk_budget_bytes": 0,
    "offloaded_bytes": 7 << 10, "written_bytes": 0, "promoted_host_bytes": 2 << 10, "promoted_disk_bytes": 0,
    "evicted_host_bytes": 3 << 10, "evicted_disk_bytes": 0, "num_waiting": 6, "num_running": 2,
}  # fmt: skip
DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


class CountingEngine(FakeEngine):
    """An engine that says how its store stands, or is not ready."""

    def __init__(self, stats=STATS):
        self._stats = stats

    async def stats(self):
        if self._stats is None:
            raise Unavailable("the engine has not started yet", code="server_interrupted")
        return self._stats


def samples(text):
    """Values by name and labels."""
    families = text_string_to_metric_families(text)
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


def response(status="completed", output_tokens=3):
    """A finished response."""
    usage = events.usage_object(input_tokens=20, output_tokens=output_tokens, cached_tokens={"device": 8, "disk": 4})
    return events.response_object(
        response_id="r", message_id="m", parent_id="u", model="x", status=status, usage=usage, timings=dict(TIMINGS)
    )


async def test_responses_and_the_store_are_shown(serve):
    """Tokens by source, ends by reason, times to first token, bytes by tier and state."""
    served = await serve(engine=CountingEngine())
    served.services.metrics.note_response(response())
    served.services.metrics.note_response(response("cancelled", output_tokens=0))
    async with served.http() as http:
        answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = samples(answer.text)
    assert found["chatserve_request_success_total", "completed"] == 1
    assert found["chatserve_request_success_total", "cancelled"] == 1
    assert found["chatserve_cached_tokens_total", "disk"] == 8
    assert found["chatserve_prompt_tokens_total",] == 40
    assert found["chatserve_time_to_first_token_seconds_count",] == 1
    assert found["chatserve_prefix_cache_queries_total",] == 40
    assert found["chatserve_prefix_cache_hits_total",] == 24
    assert found["chatserve_num_requests_waiting",] == 6
    assert found["chatserve_kv_bytes", "device", "indexed"] == 5 << 16
    assert found["chatserve_kv_bytes", "held", "host"] == 1 << 17
    assert found["chatserve_kv_offloaded_tokens_total", "host"] == 7
    assert found["chatserve_kv_promoted_tokens_total", "host"] == 2
    assert found["chatserve_kv_evicted_tokens_total", "device"] == 4
    assert found["chatserve_kv_evicted_tokens_total", "host"] == 3
    assert found["chatserve_kv_cache_usage_perc", "device"] == 0.5
    assert found["chatserve_kv_cache_usage_perc", "host"] == 0.25
    assert ("chatserve_kv_cache_usage_perc", "disk") not in found  # there is none


async def test_without_an_engine_the_rest_is_shown(serve):
    """While the engine is replaced the process's own figures stay readable."""
    served = await serve(engine=CountingEngine(None))
    served.services.metrics.note_response(response())
    async with served.http() as http:
        found = samples((await http.get("/metrics")).text)
    assert found["chatserve_generation_tokens_total",] == 3
    assert not any(name == "chatserve_kv_bytes" for name, *_ in found)


async def test_a_key_is_needed_where_there_are_keys(serve):
    """Figures tell of other tenants: without a key they are refused."""
    served = await serve(engine=CountingEngine(), api_keys=("alice=alices-key",))
    async with served.http() as http:
        assert (await http.get("/metrics")).status_code == 401
        answer = await http.get("/metrics", headers={"Authorization": "Bearer alices-key"})
    assert answer.status_code == 200


def test_two_servers_in_one_process_count_for_themselves():
    """Nothing is registered globally."""
    first, second = Metrics(), Metrics()
    first.note_response(response())
    assert first.registry.get_sample_value("chatserve_prompt_tokens_total") == 20
    assert second.registry.get_sample_value("chatserve_prompt_tokens_total") == 0


async def metrics_of(served):
    """Values by name and labels, as a scraper sees them."""
    async with served.http() as http:
        return samples((await http.get("/metrics")).text)


async def test_closes_are_counted_by_code(serve):
    """A peer that leaves counts with its own code, one that is sent away with the server's."""
    served = await serve(engine=CountingEngine())
    leaving = await served.peer()
    await leaving.socket.close(4000)
    refused = Peer(await served.connect())
    await refused.tell(type="ping", id="p", t=1)
    assert await refused.closed_with() == 4400
    async with asyncio.timeout(5):
        while (found := await metrics_of(served)).get(("chatserve_ws_closes_total", "4000")) != 1:
            await asyncio.sleep(0.01)
    assert found["chatserve_ws_closes_total", "4400"] == 1
    assert found["chatserve_ws_connections",] == 0


async def test_readers_who_come_back_are_counted(serve):
    """By what they were given, with the age of what they had missed; a first reader is none of them."""
    served = await serve(engine=CountingEngine())
    peer = await served.peer()
    session_id = (await peer.ask(type="session.create", id="c", key="k"))["session"]["id"]
    for epoch, after_seq in ((None, 0), (1, 1), (7, 1)):
        await served.services.sessions.append(session_id, events.session_updated({"title": "x"}))
        await peer.tell(type="session.attach", id="a", session_id=session_id, epoch=epoch, after_seq=after_seq)
        while (await peer.hear())["type"] != "session.attached":
            pass
    async with asyncio.timeout(5):
        while (found := await metrics_of(served)).get(("chatserve_resume_gap_seconds_count",)) != 1:
            await asyncio.sleep(0.01)
    assert found["chatserve_resume_total", "replay"] == 1
    assert found["chatserve_resume_total", "snapshot"] == 1
    assert found["chatserve_resume_gap_seconds_sum",] > 1e9  # the double's events are from 1970


async def test_a_reader_that_falls_behind_is_counted_once(serve):
    """One who reads nothing while more comes than may wait is one slow reader, however much more comes."""
    served = await serve(engine=CountingEngine())
    peer = await served.peer()
    session_id = (await peer.ask(type="session.create", id="c", key="k"))["session"]["id"]
    await peer.ask(type="session.attach", id="a", session_id=session_id)
    for _ in range(60):
        await served.services.sessions.append(session_id, events.session_updated({"title": "x" * 100_000}))
    async with asyncio.timeout(5):
        while (await metrics_of(served))["chatserve_slow_consumer_total",] != 1:
            await asyncio.sleep(0.01)


def exported_names(text):
    """Every name that a query may ask for."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    families = text_string_to_metric_families(text)
    return {family.name + suffix for family in families for suffix in suffixes[family.type]}


async def test_the_dashboard_shows_what_there_is(serve):
    """Every metric that docs/grafana.json names is exported, and every metric that is exported is on it."""
    served = await serve(engine=CountingEngine())
    async with served.http() as http:
        exported = exported_names((await http.get("/metrics")).text)
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    shown = {name for query in queries for name in re.findall(r"chatserve_\w+", query)}
    assert shown <= exported
    assert {name for name in exported if not name.endswith(("_sum", "_count", "_created"))} == shown
