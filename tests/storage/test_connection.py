"""Reaching a Redis that is not ours."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from chatserve.errors import StartupError
from chatserve.storage.connection import open_redis, shown_url


async def test_a_given_redis_is_used_as_it_is(url: str, tmp_path: Path) -> None:
    """Nothing is started or written in the data directory."""
    async with open_redis(url, tmp_path / "data") as redis:
        assert await redis.ping()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis://:secret@127.0.0.1:1/0", "cannot reach Redis at redis://127.0.0.1:1/0"),
        ("unix:///nowhere/redis.sock", "cannot reach Redis at unix:///nowhere/redis.sock"),
        ("http://127.0.0.1:6379", "cannot use the Redis URL http://127.0.0.1:6379"),
        ("redis://127.0.0.1:port", "cannot use the Redis URL"),
    ],
)
async def test_a_redis_that_cannot_be_used_is_named(url: str, reason: str, tmp_path: Path) -> None:
    """The address is in the error, the password is not."""
    with pytest.raises(StartupError, match=reason) as caught:
        async with open_redis(url, tmp_path):
            pass
    assert "secret" not in str(caught.value)


async def test_a_redis_that_may_lose_data_is_warned_of(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A policy that evicts sessions is named in the log; a proper server is not."""
    with caplog.at_level(logging.WARNING):
        async with open_redis(url, tmp_path) as redis:
            assert not caplog.records
            await redis.config_set("maxmemory-policy", "allkeys-lru")
        async with open_redis(url, tmp_path) as redis:
            await redis.config_set("maxmemory-policy", "noeviction")
    assert "may evict sessions" in caplog.text


def test_a_url_is_shown_without_its_password() -> None:
    """What is logged of a URL has neither user nor password."""
    assert shown_url("rediss://user:p@ss@host:6380/2?x=1") == "rediss://host:6380/2"
