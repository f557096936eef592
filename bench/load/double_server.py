"""`chatserve serve` over `engine_double`: `python -m bench.load.double_server STEP_MS TRACE PROFILE FLAGS...`.

Everything else is the real thing: uvicorn, WebSocket, HTTP, sessions, an embedded Redis. A file name as `PROFILE`
gets the front end's cProfile statistics, one as `TRACE` the double's steps; "-" is for none.
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
    step_ms, trace, profile, *flags = sys.argv[1:]
    options = [step_ms] if trace == "-" else [step_ms, trace]
    child._launch = lambda: _launch(options)  # the one place where a front end meets its engine
    if profile == "-":
        raise SystemExit(serve.main(flags))
    profiler = cProfile.Profile()
    status = profiler.runcall(serve.main, flags)
    profiler.dump_stats(profile)
    raise SystemExit(status)


async def _launch(options: list[str]) -> tuple[asyncio.subprocess.Process, AsyncChannel]:
    ours, theirs = socket.socketpair()
    with theirs:
        command = (sys.executable, "-m", "bench.load.engine_double", str(theirs.fileno()), *options)
        process = await asyncio.create_subprocess_exec(
            *command, pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, stdout=sys.stderr
        )
    return process, AsyncChannel(*await asyncio.open_connection(sock=ours))


if __name__ == "__main__":
    main()
