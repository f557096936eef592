"""The composition root: opens and starts every part in order, hands them over, and closes them in reverse."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from chatserve.engine.config import EngineConfig
from chatserve.server.services import Services
from chatserve.settings import ServeSettings


def engine_config(settings: ServeSettings) -> EngineConfig:
    """What the engine is told; raises StartupError for a device that this version does not support."""
    return EngineConfig(
        model=settings.model,
        device="cpu" if settings.device == "auto" else settings.device,
        kv_device_bytes=settings.kv_device_memory,
        max_context=settings.max_context,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
    )


@asynccontextmanager
async def compose(settings: ServeSettings, report: Callable[[str], None]) -> AsyncIterator[Services]:
    """Start everything and give it; `report` is told what is being waited for. Raises StartupError."""
    raise NotImplementedError
    yield
