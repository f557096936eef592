"""What the surfaces of one server process work with, put together by `compose` and given to the application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatserve.engine.api import Engine
from chatserve.server.access import Access
from chatserve.server.hub import Hub
from chatserve.server.limits import Slots
from chatserve.server.openai.completing import Completions
from chatserve.sessions.manager import SessionManager
from chatserve.settings import ServeSettings

if TYPE_CHECKING:
    from chatserve.server.metrics import Metrics

MAX_IMPORTS = 8
MAX_IMPORTS_OF_ONE = 2
MAX_SEARCHES = 4
MAX_SEARCHES_OF_ONE = 2


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a connection waits, in seconds: for hello, for a peer that reads nothing, for a close to go out."""

    hello_s: float = 10.0
    stuck_s: float = 30.0
    close_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Services:
    """The parts behind HTTP and WebSocket. `ping_store` raises Unavailable while sessions cannot be stored."""

    settings: ServeSettings
    sessions: SessionManager
    completions: Completions
    engine: Engine
    hub: Hub
    access: Access
    ping_store: Callable[[], Awaitable[None]]
    metrics: Metrics
    timeouts: Timeouts = field(default_factory=Timeouts)
    imports: Slots = field(default_factory=lambda: Slots("imports", MAX_IMPORTS, MAX_IMPORTS_OF_ONE))
    searches: Slots = field(default_factory=lambda: Slots("searches", MAX_SEARCHES, MAX_SEARCHES_OF_ONE))
