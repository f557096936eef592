"""`/metrics`: finished responses are counted, the store is shown, and a server without an engine answers too."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from chatserve.errors import Unavailable
from chatserve.protocol import events
from chatserve.server.metrics import Metrics
from tests.server.fakes import TIMINGS, FakeEngine

STATS = {
    "page_bytes": 1 << 16, "budget_bytes": 1 << 20, "held_bytes": 1 << 19, "num_sessions": 3, "evicted_pages": 4,
    "pages": {"free": 1, "private": 2, "indexed": 5, "guard": 0}, "host_bytes": 1 << 17, "disk_bytes": 1 << 18,
    "offloaded_pages": 7, "written_pages": 6, "promoted_host_pages": 2, "promoted_disk_pages": 1, "failed_pages": 0,
}  # fmt: skip


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
    assert found["chatserve_kv_bytes", "device", "indexed"] == 5 << 16
    assert found["chatserve_kv_bytes", "disk", "held"] == 1 << 18
    assert found["chatserve_kv_moved_pages", "disk", "promoted"] == 1
    assert found["chatserve_kv_cache_usage_perc", "device"] == 0.5


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
