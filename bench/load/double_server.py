"""`chatserve serve` over `engine_double`: `python -m bench.load.double_server STEP_MS PROFILE FLAGS...`.

Everything else is the real thing: uvicorn, WebSocket, HTTP, sessions, an embedded Redis. A file name as `PROFILE`
("-" for none) gets the front end's cProfile statistics.
"""

from __future__ import annotations

import asyncio
import cProfile
import socket
import sys

from chatserve.cli import serve
from chatserve.engine import child
from chatserve.engine.wire import AsyncChannel


def main() -> None:
    """Serve until a signal comes."""
    step_ms, profile, *flags = sys.argv[1:]
    child._launch = lambda: _launch(step_ms)  # the one place where a front end meets its engine
    if profile == "-":
        raise SystemExit(serve.main(flags))
    profiler = cProfile.Profile()
    status = profiler.runcall(serve.main, flags)
    profiler.dump_stats(profile)
    raise SystemExit(status)


async def _launch(step_ms: str) -> tuple[asyncio.subprocess.Process, AsyncChannel]:
    ours, theirs = socket.socketpair()
    with theirs:
        command = (sys.executable, "-m", "bench.load.engine_double", str(theirs.fileno()), step_ms)
        process = await asyncio.create_subprocess_exec(
            *command, pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, stdout=sys.stderr
        )
    return process, AsyncChannel(*await asyncio.open_connection(sock=ours))


if __name__ == "__main__":
    main()
