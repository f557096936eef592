"""Copies between CUDA pages and pinned memory, without a device: the driver of dictionaries moves the bytes."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.kvstore.fakes import PAGE_BYTES, TRANSFER_CALLS, FakeDriver, as_pages, fail_call

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings, though no GPU")
cuda = pytest.importorskip("kvstore.cuda")
cuda_transfer = pytest.importorskip("kvstore.cuda_transfer")
pinned = pytest.importorskip("kvstore.pinned")


def eventually(condition):
    """Fails unless the condition comes true within five seconds."""
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def finish(transfers, transfer):
    """Tick until the transfer is over."""
    eventually(lambda: transfers.pace(0.0) or transfer.done())


def taken(buffers, count):
    """So many buffers, waited for."""
    found = []
    while len(found) < count:
        eventually(lambda: (buffer := buffers.take()) is not None and not found.append(buffer))
    return found


@pytest.fixture
def driver():
    """A driver whose stream runs."""
    return FakeDriver()


@pytest.fixture
def memory(driver):
    """An arena of 16 pages, 8 of them created, all zeros."""
    memory = cuda.CudaMemory(PAGE_BYTES, stream=7, driver=driver, spare_pages=0, max_pages=16)
    memory.reserve(16 * PAGE_BYTES)
    memory.create(8)
    yield memory
    driver.running.set()
    memory.close()


def page_bytes_of(memory, page):
    """What a page holds."""
    return memory._driver.memory[memory._handles[page]]


def test_what_goes_down_comes_up_in_other_pages(memory, driver):
    """Each page's bytes arrive in its buffer and from there in another page; a part of a page leaves the rest alone."""
    transfers = cuda_transfer.CudaTransfers(driver, 7, memory.home)
    for page in (1, 2):
        page_bytes_of(memory, page)[:] = page
    buffers = [np.zeros(PAGE_BYTES, np.uint8), np.zeros(100, np.uint8)]
    down = transfers.down([1, 2], buffers)
    finish(transfers, down)
    assert not down.failed()
    assert down.seconds > 0
    assert [set(buffer.tolist()) for buffer in buffers] == [{1}, {2}]
    up = transfers.up([5, 6], buffers)
    finish(transfers, up)
    assert (page_bytes_of(memory, 5) == 1).all()
    assert np.count_nonzero(page_bytes_of(memory, 6)) == 100
    transfers.close()


def test_a_copy_is_done_when_the_stream_says_so(memory, driver):
    """While the stream stands, nothing is done; asking again later finds it."""
    transfers = cuda_transfer.CudaTransfers(driver, 7, memory.home)
    driver.running.clear()
    down = transfers.down([1], [np.zeros(PAGE_BYTES, np.uint8)])
    transfers.pace(0.0)
    assert not down.done()
    driver.running.set()
    finish(transfers, down)
    transfers.close()


@pytest.mark.parametrize("call", TRANSFER_CALLS)
def test_a_refused_call_is_a_transfer_that_failed(memory, driver, call):
    """Whatever the driver refuses, the transfer says that it failed, and the next one works."""
    fail_call(driver, call)
    transfers = cuda_transfer.CudaTransfers(driver, 7, memory.home)
    buffer = np.zeros(PAGE_BYTES, np.uint8)
    begun = [transfers.down([1], [buffer]), transfers.up([2], [buffer])]
    for transfer in begun:
        finish(transfers, transfer)
    assert sum(transfer.failed() for transfer in begun) == 1
    again = transfers.up([1], [buffer])
    finish(transfers, again)
    assert not again.failed()
    transfers.close()


def test_pinned_buffers_are_all_there_and_each_once(driver):
    """As many as the budget holds, none of which lies in another, all in pinned memory; then none."""
    buffers = pinned.PinnedBuffers(50 * PAGE_BYTES + 17, PAGE_BYTES, driver)
    found = taken(buffers, 50)
    assert buffers.take() is None
    assert buffers.num_slots == 50
    for number, buffer in enumerate(found):
        buffer[:] = number
    assert [set(buffer.tolist()) for buffer in found] == [{number} for number in range(50)]
    starts = {address: address + size for address, size in driver.pinned.items()}
    assert all(any(start <= b.ctypes.data < stop for start, stop in starts.items()) for b in found)
    buffers.close()
    assert not driver.pinned


def test_memory_that_cannot_be_pinned_makes_the_tier_smaller(driver, monkeypatch, caplog):
    """What the system refuses is not waited for: there are fewer slots, and a warning says so."""
    monkeypatch.setattr(pinned, "CHUNK_BYTES", 4 * PAGE_BYTES)
    fail_call(driver, "pin", nth=3, times=100)
    buffers = pinned.PinnedBuffers(100 * PAGE_BYTES, PAGE_BYTES, driver)
    eventually(lambda: buffers.num_slots == 8)
    assert len(taken(buffers, 8)) == 8
    assert buffers.take() is None
    assert "going on with" in caplog.text
    buffers.close()


def test_no_more_is_queued_than_the_step_hides(memory, driver):
    """While a step runs only what is copied meanwhile stands in the stream; the rest follows at later ticks."""
    copied = []
    copy = driver.copy_down
    driver.copy_down = lambda *arguments: (copied.append(arguments[0]), copy(*arguments))
    transfers = cuda_transfer.CudaTransfers(driver, 7, memory.home)
    step_s = 2.5 * PAGE_BYTES / (cuda_transfer.STEP_SHARE * cuda_transfer.LINK_BYTES_PER_S)
    transfers.pace(step_s)
    down = transfers.down(range(5), [np.zeros(PAGE_BYTES, np.uint8) for _ in range(5)])
    driver.running.clear()
    transfers.pace(step_s)
    assert len(copied) == 2
    driver.running.set()
    for expected in (4, 5):
        assert not down.done()
        transfers.pace(step_s)
        assert len(copied) == expected
    finish(transfers, down)
    assert copied == [memory.home(page) for page in range(5)]
    transfers.close()


def test_copies_begin_at_a_tick_after_what_their_pages_wait_for(memory, driver):
    """What the compute stream was given before comes first, and nothing begins by itself behind it."""
    transfers = cuda_transfer.CudaTransfers(driver, 7, memory.home)
    buffer = np.ones(PAGE_BYTES, np.uint8)
    driver.running.clear()
    down = transfers.down([1], [buffer])
    transfers.pace(0.0)
    assert buffer.all()
    driver.running.set()
    assert buffer.all()
    finish(transfers, down)
    assert not buffer.any()
    transfers.close()


def test_a_page_is_copied_however_short_the_step(memory, driver):
    """Copies never stand still."""
    transfers = cuda_transfer.CudaTransfers(driver, 7, memory.home)
    transfers.pace(1e-9)
    up = transfers.up([1, 2], [np.zeros(PAGE_BYTES, np.uint8) for _ in range(2)])
    assert not up.done()
    transfers.pace(1e-9)
    transfers.pace(1e-9)
    assert up.done()
    transfers.close()


def test_what_is_not_queued_yet_is_copied_before_the_end(memory, driver):
    """Closing finishes what was begun."""
    transfers = cuda_transfer.CudaTransfers(driver, 7, memory.home)
    transfers.pace(1e-9)
    buffers = [np.ones(PAGE_BYTES, np.uint8) for _ in range(3)]
    down = transfers.down([1, 2, 3], buffers)
    transfers.close()
    assert down.done()
    assert not any(buffer.any() for buffer in buffers)


def test_a_mapped_page_is_filled_at_its_home(memory, driver):
    """`home` addresses are those of the pages' own memory, wherever sessions map them."""
    memory.map(0, as_pages(3))
    memory.settle()
    transfers = cuda_transfer.CudaTransfers(driver, 7, memory.home)
    finish(transfers, transfers.up([3], [np.full(PAGE_BYTES, 9, np.uint8)]))
    assert (page_bytes_of(memory, 3) == 9).all()
    transfers.close()
