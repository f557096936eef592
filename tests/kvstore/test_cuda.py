"""CUDA memory on a GPU: what kernels see through its mappings, also while these change, and after refused calls."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from kvstore import KVLayout, KVStore, MemoryRefused, OutOfPages
from kvstore.memory import GUARD, UNMAPPED
from tests.kvstore.fakes import DRIVER_CALLS, as_pages, fail_call

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
cuda = pytest.importorskip("kvstore.cuda")
driver = pytest.importorskip("kvstore.driver")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

PAGE = 2 << 20
CHURN_SECONDS = 5.0
SOAK_SECONDS = 60.0
NEVER = 1 << 30


def make_memory(arena_pages=64, pages=8, **options):
    memory = cuda.CudaMemory(PAGE, stream=torch.cuda.current_stream().cuda_stream, **options)
    memory.reserve(arena_pages * PAGE)
    memory.create_guards()
    memory.create(pages)
    return memory


@pytest.fixture
def memory():
    """An arena of 64 pages of 2 MiB on torch's stream, 8 of them and the guards created."""
    torch.zeros(1, device="cuda")
    memory = make_memory()
    yield memory
    memory.check_integrity()
    memory.close()


def page_at(memory, place, count=1):
    return memory.view(place * PAGE, count * PAGE)


def test_page_mapped_twice_is_one_memory(memory):
    """What a kernel writes through one address another reads through the second."""
    memory.map(0, as_pages(3))
    memory.map_readonly(5 * PAGE, as_pages(3))
    memory.settle()
    page_at(memory, 0).fill_(7)
    assert bool((page_at(memory, 5) == 7).all())


CHILD = """
import sys, torch
from tests.kvstore.fakes import as_pages
from kvstore.cuda import CudaMemory

memory = CudaMemory(2 << 20, stream=torch.cuda.current_stream().cuda_stream)
memory.reserve(8 << 20)
memory.create_guards()
memory.create(1)
memory.map_readonly(0, as_pages(0))
memory.map_guard(2 << 20, 1)
memory.settle()
assert not memory.view(0, 4 << 20).any()
print("read")
try:
    memory.view(int(sys.argv[1]) << 20, 8).fill_(1)
    torch.cuda.synchronize()
except RuntimeError:
    print("fault")
"""


@pytest.mark.parametrize("megabytes", ["0", "2", "4"], ids=["borrowed", "guard", "hole"])
def test_forbidden_write_faults(megabytes):
    """A write into a borrowed page, a guard or a hole ends the writer's context; reading the first two does not."""
    command = [sys.executable, "-c", CHILD, megabytes]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.stdout.split() == ["read", "fault"]


def test_new_and_reused_pages_are_zeros(memory):
    """Whatever was there, NaN or another's rows: a kernel that multiplies by it must find finite numbers."""
    for _ in range(3):
        pages = as_pages(*memory.create(16))
        memory.map(0, pages)
        memory.settle()
        rows = page_at(memory, 0, 16)
        assert not rows.any()
        rows.fill_(255)  # NaN in every floating type
        memory.unmap(0, 16)
        memory.release(pages)


def test_zero_and_copy_take_their_turn_on_the_stream(memory):
    """Between kernels that are queued and not yet run, for pages the arena no longer shows too."""
    memory.map(0, as_pages(0, 1))
    memory.settle()
    first, second = page_at(memory, 0), page_at(memory, 1)
    torch.cuda._sleep(50_000_000)
    first.fill_(5)
    memory.copy(0, 1, PAGE // 2)
    memory.unmap(0, 1)
    memory.zero(as_pages(0))
    assert int((second == 5).sum()) == PAGE // 2
    memory.map(0, as_pages(0))
    memory.settle()
    assert not page_at(memory, 0).any()


def test_unmapping_waits_for_queued_kernels(memory):
    """A kernel that was queued before `unmap` runs long after it, and still finds its page."""
    memory.map(0, as_pages(0))
    memory.settle()
    page_at(memory, 0).to(torch.int32).sum()  # so that the next one finds its memory without waiting
    torch.cuda._sleep(200_000_000)
    total = page_at(memory, 0).to(torch.int32).sum()
    memory.unmap(0, 1)
    memory.map(0, as_pages(1))
    memory.settle()
    assert int(total) == 0
    page_at(memory, 0).fill_(1)
    torch.cuda.synchronize()


def test_addresses_past_two_to_the_31_elements_are_ordinary():
    """Rows far behind the 65,536th token of Llama-3-8B's shape, as one strided tensor."""
    layout = KVLayout(32, 8, 128, torch.bfloat16, PAGE)
    memory = make_memory(arena_pages=1 << 17)
    arena = memory.view(0, PAGE << 17).view(torch.bfloat16).view(-1, 32, 2, 8, 128)
    assert arena.numel() > 1 << 36
    for token in (70_000, 1_500_000):
        memory.map(token * layout.token_bytes // PAGE * PAGE, as_pages(2))
        memory.settle()
        arena[token, 5, 1] = 3
        rows = torch.tensor([token], device="cuda")
        assert arena[rows, 5, 1].float().sum().item() == 3 * 8 * 128
        memory.zero(as_pages(2))
    memory.close()


def test_arena_of_terabytes_is_only_addresses():
    """31 TiB reserved, the last page of it used."""
    memory = make_memory(arena_pages=31 << 19)
    memory.map((31 << 40) - PAGE, as_pages(0))
    memory.settle()
    memory.view((31 << 40) - 8, 8).fill_(1)
    torch.cuda.synchronize()
    memory.check_integrity()
    memory.close()


def churn(seconds, seed):
    """Map, unmap and remap 64 places at random while kernels verify that each page shows its own number."""
    memory, rng = make_memory(arena_pages=256, pages=64), random.Random(seed)
    memory.map(0, np.arange(64))
    memory.settle()
    for page in range(64):
        page_at(memory, page).fill_(page + 1)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    checks, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        place, count = rng.randrange(64, 240), rng.randrange(1, 16)
        pages = rng.sample(range(64), count)
        memory.map_readonly(place * PAGE, as_pages(*pages))
        memory.settle()
        shown = page_at(memory, place, count).view(count, PAGE)
        wrong += (shown != torch.tensor(pages, device="cuda")[:, None] + 1).sum()
        wrong += (page_at(memory, 0, 64).view(64, PAGE)[:, ::4096] == 0).sum()
        memory.unmap(place * PAGE, count)
        checks += 1
    assert int(wrong) == 0
    memory.check_integrity()
    memory.close()
    return checks


def test_mapping_beside_running_kernels_never_shows_a_wrong_page():
    """Five seconds of it."""
    assert churn(CHURN_SECONDS, seed=1) > 100


@pytest.mark.soak
def test_mapping_beside_running_kernels_for_a_minute():
    """The same for longer."""
    assert churn(SOAK_SECONDS, seed=2) > 1000


@pytest.mark.parametrize("nth", [1, 4])
@pytest.mark.parametrize("call", DRIVER_CALLS)
def test_store_survives_one_refused_call(call, nth):
    """Turns of three sessions on the real driver: whichever call is refused once, rows stay right."""
    layout = KVLayout(32, 8, 128, torch.bfloat16, PAGE)
    real = driver.CudaDriver()
    stream = torch.cuda.current_stream().cuda_stream
    memory = cuda.CudaMemory(PAGE, stream=stream, driver=real, spare_pages=2, max_pages=64)
    store = KVStore(
        layout, memory, budget_bytes=40 * PAGE, max_tokens=512, max_ranges=2, fingerprint=b"m", tile_tokens=128,
        floor_bytes=0,
    )  # fmt: skip
    countdown = fail_call(real, call, nth)
    for turn in range(6):
        _turn(store, f"s{turn % 3}", [turn % 3, *range(90 + 20 * turn)])
        try:
            store.shrink()
        except MemoryRefused:
            assert call in ("unmap", "release", "create_event", "record_event", "wait_event")
        store.check_integrity()
    countdown.arm(NEVER)
    store.close()


def _turn(store, session_id, token_ids):
    """Reuse what is there, check it, write the rest, read the whole tile, release; once more where it was refused."""
    for _ in range(3):
        lease = None
        try:
            lease = store.lease(session_id, b"", token_ids)
            lease.grow(len(token_ids))
            lease.guard(len(token_ids))
            store.settle()
        except OutOfPages:
            if lease:
                lease.release()
            continue
        rows = store.arena[lease.base_token :]
        kept = lease.kv_length
        wanted = torch.arange(1, len(token_ids) + 1, device="cuda")
        assert bool((rows[:kept, 3, 1, 2, 5].float() == wanted[:kept]).all())
        assert bool(torch.isfinite(rows[kept : -(-len(token_ids) // 128) * 128].float()).all())
        rows[kept : len(token_ids)] = wanted[kept:, None, None, None, None].to(torch.bfloat16)
        lease.unguard()
        lease.commit(token_ids[kept:])
        lease.release()
        return
    pytest.fail("one refused call was felt three times")


def test_device_without_memory_says_so(memory):
    """More pages than the GPU has are refused, and those made on the way are given back."""
    free = torch.cuda.mem_get_info()[0]
    before = memory.physical_bytes
    with pytest.raises(MemoryRefused, match="cuMemCreate was refused: CUDA_ERROR_OUT_OF_MEMORY"):
        memory.create(free // PAGE + 100)
    assert memory.physical_bytes <= before
    assert len(memory.create(1)) == 1


def test_guards_are_zeros_without_pages(memory):
    """Any gap of a tile, mapped to the same few pages of zeros."""
    memory.map(0, as_pages(0))
    memory.map_guard(PAGE, 7)
    memory.map_guard(20 * PAGE, 11)
    memory.settle()
    assert not page_at(memory, 1, 7).any()
    assert not page_at(memory, 20, 11).any()
    assert memory.mapped(0, 9).tolist() == [0, *[GUARD] * 7, UNMAPPED]
