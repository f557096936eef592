"""How a process takes the signals that end it."""

import asyncio
import os
import signal

import pytest

from chatserve.server.signals import StopSignals


async def load_for_ever(began):
    StopSignals()
    began.set()
    await asyncio.Event().wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_while_loading(number):
    """While loading, the first signal cancels the task that loads."""
    began = asyncio.Event()
    loading = asyncio.create_task(load_for_ever(began))
    await began.wait()
    os.kill(os.getpid(), number)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(loading, 5)


async def test_signals_once_loaded():
    """Then the first is waited for, and the second ends what the first began."""
    stop = StopSignals()
    stop.loaded()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(stop.requested(), 5)
    draining = asyncio.create_task(stop.unless_forced(asyncio.sleep(60)))
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(draining, 5)


async def test_work_that_ends_by_itself():
    """Without a second signal the work is done to its end."""
    stop, done = StopSignals(), asyncio.Event()
    stop.loaded()

    async def work():
        await asyncio.sleep(0)
        done.set()

    await stop.unless_forced(work())
    assert done.is_set()
