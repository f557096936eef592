"""What virtual memory calls cost on this GPU: the driver's own, and mapping through kvstore's `CudaMemory`.

    python bench/vmm.py

Prints microseconds a call (or a page) at several page sizes, idle and beside a stream that is never empty.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from kvstore.errors import MemoryRefused

MIB = 1 << 20
SIZES_MIB = (2, 4, 8, 16)
NUM_PAGES = 256
REPEATS = 5
QUEUE_CYCLES = 2_000_000_000  # of a kernel that only waits: about a second
COLUMNS = ("reserve", "create", "map", "set_access", "set_access run", "unmap", "unmap run", "release")


def timed(calls: int, call: Callable[[], object]) -> float:
    """Microseconds each of the `calls` that `call` makes takes."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) / calls * 1e6


def driver_row(driver, num_bytes: int) -> list[float]:
    """One line of the table of driver calls: microseconds a page, `reserve` a call."""
    total = NUM_PAGES * num_bytes
    start = time.perf_counter()
    base = driver.reserve(total)
    reserve = (time.perf_counter() - start) * 1e6
    addresses = range(base, base + total, num_bytes)
    handles: list[int] = []
    create = timed(NUM_PAGES, lambda: handles.extend(driver.create(num_bytes) for _ in addresses))

    def map_all() -> None:
        for address, handle in zip(addresses, handles, strict=True):
            driver.map(address, num_bytes, handle)

    mapping = timed(NUM_PAGES, map_all)
    single = timed(NUM_PAGES, lambda: [driver.set_access(a, num_bytes, writable=True) for a in addresses])
    unmap = timed(NUM_PAGES, lambda: [driver.unmap(a, num_bytes) for a in addresses])
    map_all()
    run = timed(NUM_PAGES, lambda: driver.set_access(base, total, writable=True))
    unmap_run = timed(NUM_PAGES, lambda: driver.unmap(base, total))
    release = timed(NUM_PAGES, lambda: [driver.release(handle) for handle in handles])
    driver.address_free(base, total)
    return [reserve, create, mapping, single, run, unmap, unmap_run, release]


def memory_row(memory, pages: np.ndarray, change: int) -> tuple[float, float, float]:
    """Microseconds a page: in the caller of `map`, until settled, in the caller of `unmap`; best of several."""
    results = []
    for repeat in range(REPEATS):
        offset = repeat * NUM_PAGES * memory.page_bytes
        groups = np.split(pages, len(pages) // change)
        start = time.perf_counter()
        for number, group in enumerate(groups):
            memory.map(offset + number * change * memory.page_bytes, group)
        called = time.perf_counter()
        memory.settle()
        settled = time.perf_counter()
        for number, group in enumerate(groups):
            memory.unmap(offset + number * change * memory.page_bytes, len(group))
        results.append((called - start, settled - start, time.perf_counter() - settled))
    return tuple(min(column) / len(pages) * 1e6 for column in zip(*results, strict=True))


@contextmanager
def busy_stream(busy: bool) -> Iterator[None]:
    """A compute stream with a second of work queued, or an empty one."""
    if busy:
        torch.cuda._sleep(QUEUE_CYCLES)
    yield
    torch.cuda.synchronize()


def print_driver_calls(driver) -> None:
    print("| page |", " | ".join(COLUMNS), "|")
    for size in SIZES_MIB:
        driver_row(driver, size * MIB)  # the first time is not like the others
        print(f"| {size} MiB |", " | ".join(f"{cost:.1f}" for cost in driver_row(driver, size * MIB)), "|")


def print_memory_calls(cuda, driver_of: Callable[[], object]) -> None:
    print("| page | pages a call | stream | map call | until settled | unmap call |")
    for size in SIZES_MIB:
        for busy in (False, True):
            stream = torch.cuda.current_stream().cuda_stream
            memory = cuda.CudaMemory(size * MIB, stream=stream, driver=driver_of(), spare_pages=0, max_pages=NUM_PAGES)
            memory.reserve(REPEATS * NUM_PAGES * memory.page_bytes * 2)
            pages = np.array(memory.create(NUM_PAGES), np.int64)
            for change in (1, 64):
                with busy_stream(busy):
                    row = memory_row(memory, pages, change)
                cells = " | ".join(f"{cost:.1f}" for cost in row)
                print(f"| {size} MiB | {change} | {'busy' if busy else 'empty'} | {cells} |")
                memory.release(np.zeros(0, np.int64))  # returns once everything is unmapped
            memory.close()


def main() -> int:
    """The tables; status 1 where there is no GPU."""
    if not torch.cuda.is_available():
        print("bench/vmm.py: no CUDA device here, nothing to measure", file=sys.stderr)
        return 1
    from kvstore import cuda  # noqa: PLC0415  # needs cuda-bindings, which machines without a GPU may lack
    from kvstore.driver import CudaDriver  # noqa: PLC0415

    torch.zeros(1, device="cuda")
    try:
        print(f"{torch.cuda.get_device_name()}, microseconds a page, {NUM_PAGES} pages")
        print_driver_calls(CudaDriver())
        print_memory_calls(cuda, CudaDriver)
    except MemoryRefused as refusal:
        print(f"bench/vmm.py: {refusal}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
