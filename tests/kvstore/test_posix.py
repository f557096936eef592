"""Real pages of a memfd: what is mapped where, what a write reaches, what the system holds, what a failure leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import IntegrityError, MemoryRefused, OutOfMappings, PosixMemory
from kvstore.linux import max_map_count
from tests.kvstore.fakes import PAGE_BYTES, FlakyCalls, as_pages

ARENA_PAGES = 24


@pytest.fixture
def memory():
    """An arena of 24 pages and 8 pages created."""
    memory = make_memory()
    yield memory
    memory.check_integrity()
    memory.close()


def make_memory(**options):
    memory = PosixMemory(PAGE_BYTES, **options)
    memory.reserve(ARENA_PAGES * PAGE_BYTES)
    assert memory.create(8) == list(range(8))
    return memory


def at(place):
    return place * PAGE_BYTES


def test_page_mapped_twice_is_one_memory(memory):
    """A write at one address is read at the other."""
    memory.map(at(0), as_pages(3))
    memory.map_readonly(at(5), as_pages(3))
    memory.view(at(0), 8)[:] = 7
    assert memory.view(at(5), 8).tolist() == [7] * 8


def test_mapping_replaces_what_was_there(memory):
    """The page that was mapped keeps its bytes."""
    memory.map(at(0), as_pages(1))
    memory.view(at(0), 4)[:] = 1
    memory.map(at(0), as_pages(2))
    assert memory.view(at(0), 4).tolist() == [0] * 4
    memory.map(at(1), as_pages(1))
    assert memory.view(at(1), 4).tolist() == [1] * 4


CHILD = """
import os
from tests.kvstore.fakes import PAGE_BYTES, as_pages
from kvstore import PosixMemory

memory = PosixMemory(PAGE_BYTES)
memory.reserve(4 * PAGE_BYTES)
memory.create(2)
memory.map(0, as_pages(0))
memory.map_readonly(PAGE_BYTES, as_pages(0))
view = memory.view(0, 4 * PAGE_BYTES)

def exit_of(access):
    child = os.fork()
    if child == 0:
        access()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def read_unmapped():
    memory.unmap(0, 1)
    view[0].item()

print(exit_of(lambda: view[0].fill_(1)), exit_of(lambda: view[PAGE_BYTES].fill_(2)),
      exit_of(lambda: view[2 * PAGE_BYTES].item()), exit_of(read_unmapped), view[PAGE_BYTES].item())
"""


def test_forbidden_access_faults():
    """A borrower's write, a read of what was never mapped, and one of what was unmapped are SIGSEGV; a write is not."""
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    owner_write, borrower_write, read_hole, read_unmapped, value = map(int, child.stdout.split())
    assert owner_write == 0
    assert [borrower_write, read_hole, read_unmapped] == [-signal.SIGSEGV] * 3
    assert value == 1


def test_neighbouring_pages_are_mapped_with_one_call():
    """Eight neighbours take one call and are one mapping beside the hole; scattered pages take one each."""
    calls = FlakyCalls()
    memory = make_memory(calls=calls)
    memory.map(at(0), np.arange(8))
    assert (calls.num_map_calls, memory.num_mappings) == (1, 2)
    memory.map_readonly(at(10), as_pages(0, 1, 5, 6, 3))
    assert (calls.num_map_calls, memory.num_mappings) == (4, 6)
    memory.check_integrity()
    memory.close()


def test_released_pages_go_back_to_the_system(memory):
    """The memfd's blocks shrink and grow with what is created, and come back as zeros under the same numbers."""
    memory.map(at(0), np.arange(8))
    memory.view(0, 8 * PAGE_BYTES)[:] = 9
    memory.unmap(at(0), 8)
    assert memory.physical_bytes == os.fstat(memory.file).st_blocks * 512 == 8 * PAGE_BYTES
    memory.release(as_pages(6, 2, 3))
    assert memory.physical_bytes == 5 * PAGE_BYTES
    assert memory.create(4) == [2, 3, 6, 8]
    memory.map(at(0), as_pages(2, 3, 6, 8, 7))
    view = memory.view(0, 5 * PAGE_BYTES)
    assert not view[: 4 * PAGE_BYTES].any()
    assert (view[4 * PAGE_BYTES :] == 9).all()


def test_zero_and_copy_reach_pages_wherever_they_are(memory):
    """Unmapped pages too; a copy takes just the bytes asked for."""
    memory.map(at(0), as_pages(1, 4))
    view = memory.view(0, 2 * PAGE_BYTES)
    view[:PAGE_BYTES] = 5
    memory.copy(1, 4, 100)
    memory.zero(as_pages(1))
    assert view[PAGE_BYTES : PAGE_BYTES + 101].tolist() == [5] * 100 + [0]
    assert not view[:PAGE_BYTES].any()
    memory.unmap(at(1), 1)
    memory.zero(as_pages(4))
    memory.map(at(1), as_pages(4))
    assert not view.any()


def test_mapped_pages_are_not_released(memory):
    """Giving memory back under a mapping would hand its reader zeros."""
    memory.map(at(0), as_pages(5))
    with pytest.raises(ValueError, match="unmap them first"):
        memory.release(as_pages(4, 5))
    assert memory.physical_bytes == 8 * PAGE_BYTES


@pytest.mark.parametrize(
    "call",
    [
        lambda memory: memory.map(at(0), as_pages(8)),
        lambda memory: memory.map(at(0), as_pages(-1)),
        lambda memory: memory.map(17, as_pages(0)),
        lambda memory: memory.map(at(23), as_pages(0, 1)),
        lambda memory: memory.unmap(-at(1), 1),
        lambda memory: memory.release(as_pages(9)),
        lambda memory: memory.copy(0, 1, PAGE_BYTES + 1),
        lambda memory: memory.view(0, (ARENA_PAGES + 1) * PAGE_BYTES),
        lambda memory: memory.reserve(PAGE_BYTES),
    ],
)
def test_impossible_argument_is_refused(memory, call):
    """Nothing outside the arena or beyond what was created is touched."""
    with pytest.raises(ValueError):  # noqa: PT011  # nine calls, one rule; each names its own value
        call(memory)


def test_page_size_must_fit_the_system():
    """The error names the value and the granularity."""
    with pytest.raises(ValueError, match=r"page_bytes=1000: .*4096"):
        PosixMemory(1000)


def test_mappings_beyond_the_bound_are_refused_with_nothing_changed():
    """Holes and runs count as the system counts them; what does not add one is still allowed."""
    memory = make_memory(max_mappings=5)
    memory.map(at(2), as_pages(0))
    memory.map(at(6), as_pages(1))
    with pytest.raises(OutOfMappings, match="7 mappings needed, 5 allowed"):
        memory.map(at(10), as_pages(2))
    assert memory.mapped(0, ARENA_PAGES).tolist().count(-1) == ARENA_PAGES - 2
    memory.map(at(7), as_pages(2))
    memory.unmap(at(2), 1)
    memory.check_integrity()
    memory.close()


def test_bound_on_mappings_is_four_fifths_of_the_systems():
    """The rest of the process needs mappings too."""
    memory = PosixMemory(PAGE_BYTES)
    assert memory.max_mappings == int(0.8 * max_map_count())
    memory.close()


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_refused_mapping_leaves_everything_as_it_was(nth):
    """Whichever of a batch's four calls fails, the old mappings stand and their bytes are reachable."""
    calls = FlakyCalls()
    memory = make_memory(calls=calls)
    memory.map(at(0), as_pages(7, 6, 5))
    memory.view(0, 3 * PAGE_BYTES)[:] = 3
    calls.countdown.arm(nth)
    with pytest.raises(MemoryRefused, match="refused by the test"):
        memory.map_readonly(at(0), as_pages(0, 2, 4, 1))
    memory.check_integrity()
    assert memory.mapped(0, 4).tolist() == [7, 6, 5, -1]
    memory.view(0, 3 * PAGE_BYTES)[:] += 1
    assert (memory.view(0, 3 * PAGE_BYTES) == 4).all()
    memory.close()


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_refused_creation_leaves_everything_as_it_was(nth):
    """Memory taken for the first runs of a batch goes back, and so do the numbers."""
    calls = FlakyCalls()
    memory = make_memory(calls=calls)
    memory.release(as_pages(1, 4))
    calls.countdown.arm(nth)
    with pytest.raises(MemoryRefused):
        memory.create(5)
    memory.check_integrity()
    assert memory.physical_bytes == 6 * PAGE_BYTES
    assert memory.create(4) == [1, 4, 8, 9]
    memory.close()


def test_refused_release_keeps_the_pages():
    """A page is either there or given back, never half."""
    calls = FlakyCalls()
    memory = make_memory(calls=calls)
    calls.countdown.arm(2)
    with pytest.raises(MemoryRefused):
        memory.release(as_pages(1, 4))
    memory.check_integrity()
    assert memory.physical_bytes == 8 * PAGE_BYTES
    memory.release(as_pages(1, 4))
    memory.close()


def test_system_errors_carry_the_call_and_the_reason():
    """More memory than can exist is an exception, not a crash."""
    memory = PosixMemory(1 << 62)
    with pytest.raises(MemoryRefused, match=r"mmap to reserve 4611686018427387904 bytes was refused: Cannot allocate"):
        memory.reserve(1 << 62)
    with pytest.raises(MemoryRefused, match=r"fallocate of 9223372036854775808 bytes was refused: Invalid argument"):
        memory.create(2)
    memory.close()


def test_lost_mapping_is_found_by_the_integrity_check():
    """The check compares with what Linux says, so it sees what the table does not know."""
    memory = make_memory()
    memory.map(at(0), as_pages(0, 1))
    memory._calls.hide(memory._address, PAGE_BYTES)
    with pytest.raises(IntegrityError, match="not mapped as the table says"):
        memory.check_integrity()
    memory.close()


def test_close_twice_is_once(memory):
    """Closing is idempotent."""
    other = PosixMemory(PAGE_BYTES)
    other.close()
    other.close()
    assert memory.num_mappings == 1


steps = st.one_of(
    st.tuples(st.just("map"), st.integers(0, 19), st.lists(st.integers(0, 7), min_size=1, max_size=5)),
    st.tuples(st.just("map_readonly"), st.integers(0, 19), st.lists(st.integers(0, 7), min_size=1, max_size=5)),
    st.tuples(st.just("unmap"), st.integers(0, 19), st.integers(1, 5)),
)


@settings(deadline=None, max_examples=60)
@given(steps=st.lists(steps, max_size=12), nth=st.integers(0, 20))
def test_any_sequence_leaves_what_a_list_of_places_says(steps, nth):
    """Random maps and unmaps, one of them refused: places are as in a plain list, mappings as Linux counts them."""
    calls = FlakyCalls()
    memory = make_memory(calls=calls)
    places = [-1] * ARENA_PAGES
    calls.countdown.arm(nth)
    for name, place, what in steps:
        try:
            getattr(memory, name)(at(place), what if name == "unmap" else as_pages(*what))
        except MemoryRefused:
            assert nth
        else:
            new = [-1] * what if name == "unmap" else what
            places[place : place + len(new)] = new
        memory.check_integrity()
        assert memory.mapped(0, ARENA_PAGES).tolist() == places
    memory.close()
