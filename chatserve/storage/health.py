"""Whether Redis answers: what counts as "away", who is told, and the probing until it is back.

One failed command marks it away; from then on commands fail at once instead of each waiting for its own timeout.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextvars import Context

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from chatserve.errors import Unavailable

logger = logging.getLogger(__name__)

_AWAY = (RedisConnectionError, RedisTimeoutError, OSError, OutOfMemoryError, ReadOnlyError)
_AWAY_CODES = ("MISCONF", "OOM", "READONLY", "LOADING", "MASTERDOWN", "NOREPLICAS", "BUSY", "CLUSTERDOWN", "TRYAGAIN")


class StorageUnavailable(Unavailable):
    """Redis does not answer or cannot write now. Whether the command was carried out is not known."""

    default_code = "storage_unavailable"


def is_away(error: BaseException) -> bool:
    """Whether the error says that Redis cannot serve now, rather than that the command was wrong."""
    refused = isinstance(error, ResponseError) and str(error).startswith(_AWAY_CODES)
    return refused or isinstance(error, _AWAY)


class Health:
    """Knows whether Redis is there. `probe` must raise what `is_away` knows while it is not."""

    def __init__(
        self, probe: Callable[[], Awaitable[object]], *, first_delay_s: float = 0.05, max_delay_s: float = 1.0
    ) -> None:
        self._probe = probe
        self._first_delay_s = first_delay_s
        self._max_delay_s = max_delay_s
        self._back = asyncio.Event()
        self._back.set()
        self._reason = ""
        self._probing: asyncio.Task[None] | None = None

    @property
    def available(self) -> bool:
        """Whether the last thing heard of Redis was good."""
        return self._back.is_set()

    async def wait_available(self) -> None:
        """Return once Redis answers; at once if it does."""
        await self._back.wait()

    def check(self) -> None:
        """Raise `StorageUnavailable` while Redis is known to be away."""
        if not self.available:
            raise self.unavailable()

    def lost(self, error: BaseException) -> StorageUnavailable:
        """Note that Redis is away, begin to probe, and give the exception to raise."""
        self._reason = str(error) or type(error).__name__
        if self.available:
            logger.warning("Redis is away: %s", self._reason)
            self._back.clear()
            self._probing = asyncio.create_task(self._probe_until_back(), context=Context())  # nobody's in particular
        return self.unavailable()

    async def close(self) -> None:
        """Stop probing."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)

    def unavailable(self) -> StorageUnavailable:
        """The exception to raise while Redis is away."""
        return StorageUnavailable(f"Redis is away ({self._reason}); try again shortly", retry_after_ms=1000)

    async def _probe_until_back(self) -> None:
        delay_s = self._first_delay_s
        answered = False
        while not answered:
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            answered = await self._answers()
            delay_s = min(2 * delay_s, self._max_delay_s)
        logger.warning("Redis is back")
        self._back.set()

    async def _answers(self) -> bool:
        try:
            await self._probe()
        except (RedisError, OSError) as error:
            self._reason = str(error) or type(error).__name__
            return False
        return True
