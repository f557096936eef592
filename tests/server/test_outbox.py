"""The send queue of one connection."""

import asyncio

from chatserve.server.outbox import Outbox


async def test_put_waits_while_full():
    """A message that does not fit waits for room and keeps its place in the order."""
    outbox = Outbox(max_bytes=10)
    await outbox.put(b"12345678")
    waiting = asyncio.create_task(outbox.put(b"abc"))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert await outbox.peek() == [b"12345678"]
    outbox.sent(1)
    await asyncio.wait_for(waiting, 1)
    assert await outbox.peek() == [b"abc"]
    assert outbox.unsent_bytes == 3


async def test_put_passes_oversized_message_alone():
    """A message larger than the bound is taken once nothing else is waiting."""
    outbox = Outbox(max_bytes=10)
    await asyncio.wait_for(outbox.put(b"x" * 100), 1)
    assert await outbox.peek() == [b"x" * 100]


async def test_notice_passes_a_full_outbox_once():
    """A notice does not wait, and the same notice does not pile up."""
    outbox = Outbox(max_bytes=1)
    await outbox.put(b"full")
    outbox.put_notice(b"list changed")
    outbox.put_notice(b"list changed")
    assert await outbox.peek() == [b"full", b"list changed"]
    outbox.sent(1)
    assert await outbox.peek() == [b"list changed"]
    outbox.sent(1)
    await asyncio.wait_for(outbox.wait_empty(), 1)


async def test_wait_empty_waits_for_the_last_send():
    """A message counts as unsent until it has left."""
    outbox = Outbox(max_bytes=10)
    await outbox.put("text")
    waiting = asyncio.create_task(outbox.wait_empty())
    await outbox.peek()
    await asyncio.sleep(0)
    assert not waiting.done()
    outbox.sent(1)
    await asyncio.wait_for(waiting, 1)
