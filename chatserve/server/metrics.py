"""What Prometheus reads at `/metrics`, under the names that vLLM and SGLang use, so that dashboards carry over.

Finished responses are counted as they end; everything else is asked for when it is read.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chatserve.errors import ServiceError
from chatserve.server.http import services_of, tenant_of
from chatserve.server.services import Services

SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 1.0)
TIERS = ("device", "host", "disk")


class Metrics:
    """The counters of one server process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From acceptance to the first token", SECONDS
        )
        self._token_gap = self._histogram("inter_token_latency_seconds", "Mean time between tokens", TOKEN_SECONDS)
        self._whole = self._histogram("e2e_request_latency_seconds", "From acceptance to the end", SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "Waiting to be admitted", SECONDS)
        self._restore = self._histogram("kv_promote_seconds", "Waiting for a history to come back", SECONDS)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts, cached ones included")
        self._generated = self._counter("generation_tokens", "Tokens generated")
        self._ended = self._counter("request_success", "Responses that came to their end", "finished_reason")
        self._cached = self._counter("cached_tokens", "Tokens of prompts that were not computed", "source")
        self._running = self._gauge("num_requests_running", "Responses being made")
        self._connections = self._gauge("ws_connections", "WebSocket connections")
        self._sessions = self._gauge("sessions", "Sessions, by where they are", "state")
        self._kv_bytes = self._gauge("kv_bytes", "Bytes of attention history", "tier", "state")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Part of the memory for history that is in use", "tier")
        self._kv_moved = self._gauge("kv_moved_pages", "Pages moved since the engine started", "direction", "tier")

    def note_response(self, response: dict[str, Any]) -> None:
        """A response has come to its end."""
        usage, timings = response["usage"], response["timings"]
        self._ended.labels(response["status"]).inc()
        self._prompt.inc(usage["input_tokens"])
        self._generated.inc(usage["output_tokens"])
        for tier in TIERS:
            self._cached.labels(tier).inc(usage["cached_tokens_details"][tier])
        self._whole.observe((timings["ttft_ms"] + timings["decode_ms"]) / 1000)
        if usage["output_tokens"]:
            self._first_token.observe(timings["ttft_ms"] / 1000)
            self._queue.observe(timings["queue_ms"] / 1000)
        if timings["restore_ms"]:
            self._restore.observe(timings["restore_ms"] / 1000)
        if usage["output_tokens"] > 1:
            self._token_gap.observe(timings["decode_ms"] / 1000 / (usage["output_tokens"] - 1))

    async def text(self, services: Services) -> bytes:
        """Everything, as Prometheus reads it; what the engine knows is missing while none is ready."""
        self._running.set(services.sessions.num_running)
        self._connections.set(services.hub.num_connections)
        self._sessions.labels("live").set(services.sessions.num_live)
        try:
            self._take_stats(await services.engine.stats())
        except ServiceError:
            self._kv_bytes.clear()
        return generate_latest(self.registry)

    def _take_stats(self, stats: dict[str, Any]) -> None:
        pages, page_bytes = stats["pages"], stats["page_bytes"]
        for state in ("free", "private", "indexed", "guard"):
            self._kv_bytes.labels("device", state).set(pages[state] * page_bytes)
        self._kv_bytes.labels("host", "held").set(stats["host_bytes"])
        self._kv_bytes.labels("disk", "held").set(stats["disk_bytes"])
        self._kv_usage.labels("device").set(stats["held_bytes"] / stats["budget_bytes"])
        self._sessions.labels("resident").set(stats["num_sessions"])
        self._kv_moved.labels("evicted", "device").set(stats["evicted_pages"])
        self._kv_moved.labels("offloaded", "host").set(stats["offloaded_pages"])
        self._kv_moved.labels("offloaded", "disk").set(stats["written_pages"])
        self._kv_moved.labels("promoted", "host").set(stats["promoted_host_pages"])
        self._kv_moved.labels("promoted", "disk").set(stats["promoted_disk_pages"])
        self._kv_moved.labels("failed", "host").set(stats["failed_pages"])

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"chatserve_{name}", text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"chatserve_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"chatserve_{name}", text, labels, registry=self.registry)


async def metrics(request: Request) -> Response:
    """`GET /metrics`: the figures of this process and its engine."""
    tenant_of(request)
    services = services_of(request)
    return Response(await services.metrics.text(services), media_type=CONTENT_TYPE_LATEST)


ROUTES = [Route("/metrics", metrics, methods=["GET"])]
