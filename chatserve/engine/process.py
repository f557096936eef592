"""The engine's process: `python -m chatserve.engine.process FD PARENT_PID`, a child of the front end.

It reads its configuration from the socket, loads the model, and steps while there is work. It ends when the front
end's socket closes, and dies with the front end's process.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import socket
import sys
from contextlib import suppress

from chatserve.engine.api import EngineInfo
from chatserve.engine.build import build
from chatserve.engine.config import EngineConfig
from chatserve.engine.core import EngineCore
from chatserve.engine.wire import ChannelClosed, SyncChannel
from chatserve.errors import StartupError
from chatserve.logs import configure_logging

IDLE_SHRINK_S = 5.0
MOVING_S = 0.002  # how long to wait for messages while something moves between tiers
AWAITED_S = 0.0005  # the same while a request waits for it
FLUSH_S = 15.0  # at the end, for histories to be saved
PR_SET_PDEATHSIG = 1
logger = logging.getLogger(__name__)


def main() -> None:
    """Serve the front end at the inherited socket until it closes."""
    die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front end's to handle: it drains first
    channel = SyncChannel(socket.socket(fileno=int(sys.argv[1])))
    try:
        core = _start(channel)
        if core is not None:
            gc.collect()
            gc.freeze()  # what was loaded stays: the collector need not look at it in mid-step
            serve_to_the_end(channel, core)
    except ChannelClosed:
        logger.info("the front end closed its socket before the engine was ready")
    except Exception:  # whatever ends the engine, its last line is as machines read it
        logger.exception("the engine failed")
        raise SystemExit(1) from None


def serve_to_the_end(channel: SyncChannel, core: EngineCore) -> None:
    """Serve until the front end has gone, then save the histories."""
    with suppress(ChannelClosed):
        serve(channel, core)
    logger.info("the front end closed its socket; the engine ends")
    core.close(FLUSH_S)


def die_with_parent(parent_pid: int) -> None:
    """Ask Linux to kill this process when the front end dies; elsewhere the closed socket does it a little later."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            raise SystemExit("the front end died before its engine had started")


def serve(channel: SyncChannel, core: EngineCore) -> None:
    """Commands in, one step, one message out, for ever; raises ChannelClosed at the end."""
    is_moving = False
    while True:
        frames = channel.receive(_patience_s(core, is_moving))
        for command in (command for frame in frames for command in frame):
            core.handle(command)
        if frames or not core.idle:
            is_moving = True  # what was computed may go down as soon as there is nothing else to do
            core.step()
            channel.send(core.take_events())
        elif is_moving:
            is_moving = core.offload()
        else:
            core.rest()


def _patience_s(core: EngineCore, is_moving: bool) -> float:
    """How long the next message may take to come before there is something else to do."""
    if core.idle:
        return MOVING_S if is_moving else IDLE_SHRINK_S
    return AWAITED_S if core.is_waiting else 0.0


def _start(channel: SyncChannel) -> EngineCore | None:
    frames = channel.receive(None)
    config = EngineConfig.from_map(frames[0][0])
    configure_logging(config.log_level, config.log_format)
    try:
        core, info = build(config)
    except (StartupError, OSError, ValueError) as error:
        channel.send([["failed", str(error)]])
        return None
    channel.send([["ready", {name: getattr(info, name) for name in EngineInfo.__slots__}]])
    return core


if __name__ == "__main__":
    main()
