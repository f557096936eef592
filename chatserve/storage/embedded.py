"""A Redis of our own: started with us, restarted when it dies, ended with us after it has flushed.

It listens on a unix socket in a private runtime directory and appends every write to disk before it answers. It holds
a lock of its own in the data directory, inherited as an open file, so that a successor waits for it to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from chatserve.errors import StartupError
from chatserve.storage import trampoline
from chatserve.storage.data_directory import DataDirectory, FileLock, make_private
from chatserve.storage.redis_binary import RedisBinary, find_redis_binary

logger = logging.getLogger(__name__)

_MAX_SOCKET_PATH_BYTES = 100  # the kernel allows 107
_MAX_RESTART_DELAY_S = 5.0
_RUNTIME_DIR_PREFIX = "chatserve-"


class EmbeddedRedis:
    """Owns a data directory and the redis-server that keeps its data there.

    `predecessor_timeout_s`: how long to wait for the Redis of a server that was killed. `load_timeout_s`: how long
    reading the data at start may take. `stop_timeout_s`: how long it may flush before it is killed.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        predecessor_timeout_s: float = 5.0,
        load_timeout_s: float = 600.0,
        stop_timeout_s: float = 10.0,
    ) -> None:
        self._data_directory = DataDirectory(data_dir)
        self._redis_dir = data_dir / "redis"
        self._log_path = self._redis_dir / "redis.log"
        self._runtime_dir_note = self._redis_dir / "runtime-directory"
        self._predecessor_timeout_s = predecessor_timeout_s
        self._load_timeout_s = load_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._runtime_dir: Path | None = None
        self._binary: RedisBinary | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervision: asyncio.Task[None] | None = None

    @property
    def socket_path(self) -> Path:
        """Where it listens. Raises `ValueError` before the start."""
        if self._runtime_dir is None:
            raise ValueError("Redis has not been started")
        return self._runtime_dir / "redis.sock"

    @property
    def pid(self) -> int | None:
        """The process id of the running server."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start and wait until it answers. Raises `StartupError` with the reason and Redis' own last words.

        Call it on a thread that lives as long as the server: the kernel ends Redis with that thread.
        """
        self._data_directory.open()
        try:
            self._binary = await find_redis_binary()
            self._prepare_directories(self._binary)
            await self._launch()
        except BaseException:  # a cancelled start must not leave Redis or the lock behind either; raised again
            await self.stop()
            raise
        self._supervision = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """Let it flush, end it, and give the data directory up. Harmless when it is not running."""
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.gather(self._supervision, return_exceptions=True)
            self._supervision = None
        await self._end_process()
        if self._runtime_dir is not None:
            shutil.rmtree(self._runtime_dir, ignore_errors=True)
            self._runtime_dir_note.unlink(missing_ok=True)
            self._runtime_dir = None
        self._data_directory.close()

    def _prepare_directories(self, binary: RedisBinary) -> None:
        make_private(self._redis_dir)
        if binary.version < (7, 0) and (self._redis_dir / "appendonlydir").exists():
            raise StartupError(
                f"the data in {self._redis_dir} was written by Redis 7 or later, but only {binary.path} of version "
                f"{binary.version[0]}.{binary.version[1]} was found; put the newer redis-server on PATH"
            )
        self._remove_runtime_dir_left_over()
        self._runtime_dir = _make_runtime_dir()
        self._runtime_dir_note.write_text(str(self._runtime_dir))

    def _remove_runtime_dir_left_over(self) -> None:
        """A killed server leaves its runtime directory behind; the next one in this data directory has a note of it."""
        if self._runtime_dir_note.exists():
            noted = Path(self._runtime_dir_note.read_text())
            if noted.name.startswith(_RUNTIME_DIR_PREFIX):
                shutil.rmtree(noted, ignore_errors=True)

    async def _launch(self) -> None:
        lock = FileLock(self._redis_dir / "lock")
        if not await lock.acquire_within(self._predecessor_timeout_s):
            raise StartupError(
                f"a Redis left over from an earlier server (process id {lock.owner()}) still holds {self._redis_dir}; "
                "start again when it has ended, or end it"
            )
        try:
            self._process = await self._spawn(lock)
            lock.write_owner(self._process.pid)
        finally:
            lock.release()
        await self._wait_ready(self._process)

    async def _spawn(self, lock: FileLock) -> asyncio.subprocess.Process:
        if self._log_path.exists():
            self._log_path.replace(self._log_path.with_suffix(".log.1"))
        with self._log_path.open("wb") as log:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                trampoline.__file__,
                str(os.getpid()),
                *self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock.fileno],
                start_new_session=True,
            )

    def _command(self) -> list[str]:
        assert self._binary is not None
        settings = {
            "port": "0",
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "600",
            "dir": str(self._redis_dir.resolve()),
            "appendonly": "yes",
            "appendfsync": "always",
            "aof-load-truncated": "yes",
            "save": "",
            "daemonize": "no",
            "maxmemory-policy": "noeviction",
        }
        return [str(self._binary.path), *(word for name, value in settings.items() for word in (f"--{name}", value))]

    async def _wait_ready(self, process: asyncio.subprocess.Process) -> None:
        """Wait until it answers PING; while it reads its data it answers LOADING, or nothing."""
        deadline = asyncio.get_running_loop().time() + self._load_timeout_s
        while not await _answers_ping(self.socket_path):
            if process.returncode is not None:
                raise StartupError(f"Redis ended while starting (exit code {process.returncode}): {self._last_words()}")
            if asyncio.get_running_loop().time() > deadline:
                raise StartupError(f"Redis was not ready after {self._load_timeout_s:.0f} s: {self._last_words()}")
            await asyncio.sleep(0.01)

    def _last_words(self, num_lines: int = 8) -> str:
        lines = self._log_path.read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-num_lines:]) or f"it wrote nothing to {self._log_path}"

    async def _supervise(self) -> None:
        """Start it again whenever it ends by itself, waiting longer each time that fails."""
        delay_s = 0.1
        while True:
            assert self._process is not None
            exit_code = await self._process.wait()
            _kill_group(self._process.pid)
            logger.error("Redis ended (exit code %s), starting it again: %s", exit_code, self._last_words())
            try:
                await self._launch()
                delay_s = 0.1
            except (StartupError, OSError) as error:
                logger.error("Redis cannot be started again: %s", error)
                await self._end_process()
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _MAX_RESTART_DELAY_S)

    async def _end_process(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        self._signal(process, signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), self._stop_timeout_s)
        except TimeoutError:
            logger.error("Redis did not end within %.0f s and is killed", self._stop_timeout_s)
            self._signal(process, signal.SIGKILL)
            await process.wait()

    @staticmethod
    def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def _kill_group(leader_pid: int) -> None:
    """End what a Redis that died left behind: a child rewriting the log, which holds the lock but does nothing more."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader_pid, signal.SIGKILL)


def _make_runtime_dir() -> Path:
    """A new private directory whose name is short enough for a unix socket in it."""
    for base in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):
        if base and os.access(base, os.W_OK | os.X_OK) and len(os.fsencode(base)) < _MAX_SOCKET_PATH_BYTES - 40:
            return Path(tempfile.mkdtemp(prefix=_RUNTIME_DIR_PREFIX, dir=base))
    raise StartupError(
        "no writable directory with a short name for the socket; set TMPDIR to one of under 60 characters"
    )


async def _answers_ping(socket_path: Path) -> bool:
    """Whether a server at this socket answers PING, and not that it is still loading."""
    try:
        reader, writer = await asyncio.open_unix_connection(socket_path)
    except OSError:
        return False
    try:
        writer.write(b"PING\r\n")
        return (await asyncio.wait_for(reader.readline(), 5.0)).startswith(b"+PONG")
    except (OSError, TimeoutError):
        return False
    finally:
        writer.close()
