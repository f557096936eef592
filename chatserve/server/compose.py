"""The composition root: opens and starts every part in order, hands them over, and closes them in reverse."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from chatserve.engine.api import Engine
from chatserve.engine.client import EngineClient
from chatserve.engine.config import EngineConfig
from chatserve.pretrained import load_pretrained
from chatserve.server.access import Access
from chatserve.server.hub import Hub
from chatserve.server.limits import LimitedEngine, TurnLimiter
from chatserve.server.metrics import Metrics
from chatserve.server.openai.completing import Completions
from chatserve.server.services import Services
from chatserve.sessions.limits import SessionLimits
from chatserve.sessions.manager import SessionManager
from chatserve.sessions.retention import Retention
from chatserve.settings import ServeSettings
from chatserve.storage.connection import open_redis, socket_url
from chatserve.storage.records import RedisSessionRecords
from chatserve.storage.session_store import SessionStore, StoreWatch
from chatserve.text.pipeline import TextPipeline

MAX_RUNNING = 1024  # more than any device's default


@asynccontextmanager
async def compose(settings: ServeSettings, report: Callable[[str], None]) -> AsyncIterator[Services]:
    """Start everything and give it; `report` is told what is being waited for.

    Raises StartupError when a part cannot start; those that have are closed then, as they are on leaving.
    """
    config = engine_config(settings)
    instance_id = secrets.token_hex(8)
    async with AsyncExitStack() as stack:
        engine = EngineClient(config)
        stack.push_async_callback(engine.close)
        starting = asyncio.create_task(engine.start(), name="engine-start")  # loads while the rest gets ready
        stack.push_async_callback(_settle, starting)
        report(f"Reading the tokenizer of {settings.model}")
        text = await asyncio.to_thread(_load_text, settings.model)
        report("Opening the session store")
        redis = await stack.enter_async_context(open_redis(settings.redis_url, settings.data_dir))
        quota = session_quota(settings)
        metrics = Metrics()
        watch = StoreWatch(metrics.note_append, metrics.note_duplicate)
        store = SessionStore(redis, instance_id, durable=settings.redis_url is None, max_sessions=quota, watch=watch)
        stack.push_async_callback(store.close)
        records = RedisSessionRecords(redis, instance_id)
        stack.push_async_callback(records.close)
        report(f"Loading {settings.model}")
        await starting
        engine.read_records(settings.redis_url or socket_url(redis))
        report("Taking up the sessions")
        limits = SessionLimits(resume_ttl_s=settings.resume_ttl_s)
        limited = limited_engine(engine, settings)
        sessions = SessionManager(
            store,
            limited,
            text,
            records,
            limits,
            on_response=metrics.note_response,
            priority_of=session_priority(settings),
        )
        stack.push_async_callback(sessions.close)
        await sessions.start()
        hub = Hub(max_connections=settings.max_connections, max_key_connections=settings.max_key_connections)
        if settings.session_ttl_s is not None:
            retention = Retention(store, sessions, settings.session_ttl_s, on_deleted=hub.sessions_changed)
            stack.push_async_callback(_settle, asyncio.create_task(retention.run(), name="retention"))
        yield Services(
            settings=settings,
            sessions=sessions,
            completions=Completions(limited, text, on_response=metrics.note_response),
            engine=engine,
            hub=hub,
            access=Access(keys=settings.keys, allowed_origins=settings.allowed_origins, bound_host=settings.host),
            ping_store=store.ping,
            metrics=metrics,
        )


async def _settle(task: asyncio.Task[Any]) -> None:
    """Wait for the task's end, which is now if it has not come yet."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def engine_config(settings: ServeSettings) -> EngineConfig:
    """What the engine is told; what is left open there it decides for the device it finds."""
    return EngineConfig(
        model=settings.model,
        device=settings.device,
        dtype=settings.dtype,
        load_format=settings.load_format,
        kv_device_bytes=settings.kv_device_memory,
        kv_host_bytes=settings.kv_host_memory,
        kv_disk_bytes=settings.kv_disk_space,
        kv_disk_path=str(settings.kv_directory),
        max_context=settings.max_context,
        log_level=settings.log_level,
        log_format=settings.log_format,
        max_step_tokens=settings.max_step_tokens,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting + (settings.max_running or MAX_RUNNING),  # the front end refuses before
    )


def limited_engine(engine: Engine, settings: ServeSettings) -> LimitedEngine:
    """The engine as tenants may use it."""
    tenants = {key.tenant: key.limits for key in settings.keys}
    max_turns = engine.info.max_running + settings.max_waiting
    return LimitedEngine(engine, TurnLimiter(tenants, settings.default_limits, max_turns=max_turns))


def session_priority(settings: ServeSettings) -> Callable[[str], int]:
    """How much rather than others' a tenant's histories are kept."""
    priorities = {key.tenant: key.limits.priority or 0 for key in settings.keys}
    return lambda tenant: priorities.get(tenant, 0)


def session_quota(settings: ServeSettings) -> Callable[[str], int | None]:
    """How many sessions a tenant may have."""
    quotas = {key.tenant: key.limits.sessions for key in settings.keys}
    return lambda tenant: quotas.get(tenant, settings.default_limits.sessions)


def _load_text(model: str) -> TextPipeline:
    pretrained = load_pretrained(model)
    return TextPipeline(pretrained.tokenizer, pretrained.eos_token_ids)
