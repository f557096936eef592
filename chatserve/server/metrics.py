"""What Prometheus reads at `/metrics`, under the names that vLLM and SGLang use, so that dashboards carry over.

What happens is counted as it happens; what is, and the engine's own totals, are asked for when they are read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chatserve.errors import ServiceError
from chatserve.protocol.events import Mode
from chatserve.server.http import services_of, tenant_of
from chatserve.server.services import Services

SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 1.0)
APPEND_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 5.0)
GAP_SECONDS = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)
TIERS = ("device", "host", "disk")
DEVICE_STATES = ("free", "private", "indexed", "guard")
PREFIX = "chatserve"
Values = Mapping[tuple[str, ...], float]  # by the labels' values


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
        self._queries = self._counter("prefix_cache_queries", "Tokens of prompts that were looked up")
        self._hits = self._counter("prefix_cache_hits", "Tokens of prompts that were found, on any tier")
        self._closes = self._counter("ws_closes", "WebSocket connections that ended, by close code", "code")
        self._resumes = self._counter("resume", "Readers that came back with a cursor", "mode")
        self._gap = self._histogram("resume_gap_seconds", "Age of the oldest event that they had missed", GAP_SECONDS)
        self._slow = self._counter("slow_consumer", "Times that a reader fell behind what may wait for it")
        self._duplicates = self._counter("duplicate_commands", "Commands whose key had been used before")
        self._append = self._histogram("event_log_append_seconds", "Writing to the session log", APPEND_SECONDS)
        self._running = self._gauge("num_requests_running", "Responses being made")
        self._connections = self._gauge("ws_connections", "WebSocket connections and event streams")
        self._sessions = self._gauge("sessions", "Sessions in the server's memory, by whether they run", "state")
        self._engine = EngineFigures()
        self.registry.register(self._engine)

    def note_response(self, response: dict[str, Any]) -> None:
        """A response has come to its end."""
        usage, timings = response["usage"], response["timings"]
        self._ended.labels(response["status"]).inc()
        self._prompt.inc(usage["input_tokens"])
        self._generated.inc(usage["output_tokens"])
        self._queries.inc(usage["input_tokens"])
        for tier in TIERS:
            self._cached.labels(tier).inc(usage["cached_tokens_details"][tier])
            self._hits.inc(usage["cached_tokens_details"][tier])
        self._whole.observe((timings["ttft_ms"] + timings["decode_ms"]) / 1000)
        if usage["output_tokens"]:
            self._first_token.observe(timings["ttft_ms"] / 1000)
            self._queue.observe(timings["queue_ms"] / 1000)
        if timings["restore_ms"]:
            self._restore.observe(timings["restore_ms"] / 1000)
        if usage["output_tokens"] > 1:
            self._token_gap.observe(timings["decode_ms"] / 1000 / (usage["output_tokens"] - 1))

    def note_close(self, code: int) -> None:
        """A WebSocket connection has ended, with this code from either side."""
        self._closes.labels(str(code)).inc()

    def note_resume(self, mode: Mode) -> None:
        """A reader came back with a cursor, and was given what follows it or a snapshot."""
        self._resumes.labels(mode).inc()

    def note_missed(self, ts_ms: int) -> None:
        """The first event that a reader had missed is from then, in milliseconds since 1970."""
        self._gap.observe(max(0.0, time.time() - ts_ms / 1000))

    def note_slow_reader(self) -> None:
        """As much as may wait for a reader does, and there is more."""
        self._slow.inc()

    def note_append(self, seconds: float) -> None:
        """A session's log was written to."""
        self._append.observe(seconds)

    def note_duplicate(self) -> None:
        """A command came whose key had been used before."""
        self._duplicates.inc()

    async def text(self, services: Services) -> bytes:
        """Everything, as Prometheus reads it; what the engine knows is missing while none is ready."""
        sessions = services.sessions
        self._running.set(sessions.num_running + services.completions.num_running)
        self._connections.set(services.hub.num_connections)
        self._sessions.labels("running").set(sessions.num_running)
        self._sessions.labels("idle").set(max(0, sessions.num_live - sessions.num_running))
        try:
            self._engine.stats = await services.engine.stats()
        except ServiceError:
            self._engine.stats = None
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry)


class EngineFigures(Collector):
    """What the engine said of itself last, see `Engine.stats`; nothing where there is none. Counts begin with it."""

    def __init__(self) -> None:
        self.stats: dict[str, Any] | None = None

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Each family, for the registry."""
        stats = self.stats
        if stats is None:
            return
        yield _gauge("num_requests_waiting", "Requests that wait to be admitted", (), {(): stats["num_waiting"]})
        yield _gauge("kv_sessions", "Sessions with rows on the device", (), {(): stats["num_sessions"]})
        yield _gauge("kv_bytes", "Bytes of attention history", ("tier", "state"), _bytes_held(stats))
        yield _gauge("kv_cache_usage_perc", "Part of a tier's budget that is in use", ("tier",), _usage(stats))
        yield _counter("kv_offloaded_tokens", "Tokens copied down to this tier", ("tier",), _offloaded(stats))
        yield _counter("kv_promoted_tokens", "Tokens brought back from this tier", ("tier",), _promoted(stats))
        yield _counter("kv_evicted_tokens", "Tokens forgotten by this tier", ("tier",), _evicted(stats))
        yield _counter("kv_failed_pages", "Pages that could not be copied", (), {(): stats["failed_pages"]})


def _bytes_held(stats: Mapping[str, Any]) -> Values:
    on_device = {("device", state): stats["pages"][state] * stats["page_bytes"] for state in DEVICE_STATES}
    return on_device | {("host", "held"): stats["host_bytes"], ("disk", "held"): stats["disk_bytes"]}


def _usage(stats: Mapping[str, Any]) -> Values:
    """From 0 to 1; a tier that is off has none."""
    used = {"device": stats["held_bytes"], "host": stats["host_bytes"], "disk": stats["disk_bytes"]}
    budgets = {tier: stats["budget_bytes" if tier == "device" else f"{tier}_budget_bytes"] for tier in TIERS}
    return {(tier,): used[tier] / budgets[tier] for tier in TIERS if budgets[tier]}


def _offloaded(stats: Mapping[str, Any]) -> Values:
    return {("host",): _tokens(stats, "offloaded_bytes"), ("disk",): _tokens(stats, "written_bytes")}


def _promoted(stats: Mapping[str, Any]) -> Values:
    return {(tier,): _tokens(stats, f"promoted_{tier}_bytes") for tier in ("host", "disk")}


def _evicted(stats: Mapping[str, Any]) -> Values:
    below: Values = {(tier,): _tokens(stats, f"evicted_{tier}_bytes") for tier in ("host", "disk")}
    return {("device",): stats["evicted_tokens"], **below}


def _tokens(stats: Mapping[str, Any], name: str) -> float:
    return float(stats[name]) / float(stats["token_bytes"])


def _gauge(name: str, text: str, labels: tuple[str, ...], values: Values) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def _counter(name: str, text: str, labels: tuple[str, ...], values: Values) -> CounterMetricFamily:
    family = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


async def metrics(request: Request) -> Response:
    """`GET /metrics`: the figures of this process and its engine."""
    tenant_of(request)
    services = services_of(request)
    return Response(await services.metrics.text(services), media_type=CONTENT_TYPE_LATEST)


ROUTES = [Route("/metrics", metrics, methods=["GET"])]
