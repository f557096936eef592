"""One engine process as the front end sees it: spawned, configured, killed, reaped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from typing import Self

from chatserve.engine.api import EngineInfo
from chatserve.engine.config import EngineConfig
from chatserve.engine.wire import AsyncChannel, ChannelClosed
from chatserve.errors import StartupError

CLOSE_TIMEOUT_S = 18.0  # the engine saves histories at its end


class EngineChild:
    """A ready engine in its own process group. Closing its channel makes it end by itself."""

    def __init__(self, process: asyncio.subprocess.Process, channel: AsyncChannel, info: EngineInfo) -> None:
        self._process = process
        self.channel = channel
        self.info = info

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @classmethod
    async def spawn(cls, config: EngineConfig) -> Self:
        """Start a process and wait until it has loaded the model; raises StartupError with the engine's own reason.

        The child is made by exec, never by a bare fork: it shares no locks, threads or mappings with the front end.
        """
        launching = asyncio.ensure_future(_launch())
        try:
            process, channel = await asyncio.shield(launching)
            channel.post(config.as_map())
            [[kind, payload]] = await channel.receive()
        except ChannelClosed:
            status = await process.wait()
            raise StartupError(f"the engine ended with status {status} at its start; its log above says why") from None
        except asyncio.CancelledError:
            await _end(*await launching)
            raise
        if kind == "failed":
            await _end(process, channel)
            raise StartupError(payload)
        return cls(process, channel, EngineInfo(**payload))

    def kill(self) -> None:
        """End it at once; the channel then reads end of file."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> None:
        """Close the socket and wait for the process's end, killing it after `CLOSE_TIMEOUT_S`."""
        await _end(self._process, self.channel)

    def describe_end(self) -> str:
        """How the process ended, for the log."""
        status = self._process.returncode
        if status is None:
            return "its connection"
        return f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"


async def _launch() -> tuple[asyncio.subprocess.Process, AsyncChannel]:
    """A process and our end of its socket.

    Its worker threads sleep while they wait: spinning, they starve the front end beside them, and on a machine that
    is busy with anything else a step takes twenty times as long (measured on 2 cores).
    """
    ours, theirs = socket.socketpair()
    with theirs:
        command = (sys.executable, "-m", "chatserve.engine.process", str(theirs.fileno()), str(os.getpid()))
        process = await asyncio.create_subprocess_exec(
            *command, pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, stdout=sys.stderr,
            start_new_session=True, env={"OMP_WAIT_POLICY": "passive", **os.environ},
        )  # fmt: skip
    return process, AsyncChannel(*await asyncio.open_connection(sock=ours))


async def _end(process: asyncio.subprocess.Process, channel: AsyncChannel) -> None:
    channel.close()
    try:
        await asyncio.wait_for(process.wait(), CLOSE_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
