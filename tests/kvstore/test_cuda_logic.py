"""CUDA memory without a device: a driver of dictionaries that keeps CUDA's rules, refuses on demand and can wait."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore import CudaFault, KVStore, MemoryRefused, OutOfMappings, OutOfPages
from kvstore.memory import GUARD, UNMAPPED
from tests.kvstore.fakes import PAGE_BYTES, FakeDriver, as_pages, fail_call, make_layout

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings, though no GPU")
cuda = pytest.importorskip("kvstore.cuda")

ARENA_PAGES = 48
NEVER = 1 << 30


def make_memory(*, spare_pages=0, driver=None, **options):
    memory = cuda.CudaMemory(
        PAGE_BYTES, stream=7, driver=driver or FakeDriver(), spare_pages=spare_pages, max_pages=64, **options
    )
    memory.reserve(ARENA_PAGES * PAGE_BYTES)
    memory.create_guards()
    assert memory.create(8) == list(range(8))
    return memory


@pytest.fixture
def memory():
    """An arena of 48 pages, 8 pages and the guards created; no spare pages."""
    memory = make_memory()
    yield memory
    memory._driver.running.set()
    memory.check_integrity()
    memory.close()
    assert not memory._driver.mappings
    assert not memory._driver.memory


def at(place):
    return place * PAGE_BYTES


def shown(memory, count=ARENA_PAGES):
    """What the driver has at the first places: page, (page,) when read-only, GUARD, UNMAPPED; None without access."""
    pages = {handle: page for page, handle in memory._handles.items()}
    places = [UNMAPPED] * ARENA_PAGES
    for address, (size, handle, writable) in memory._driver.mappings.items():
        place = (address - memory._address) // PAGE_BYTES
        if 0 <= place < ARENA_PAGES:
            page = pages.get(handle, GUARD)
            what = None if writable is None else page if writable or page == GUARD else (page,)
            places[place : place + size // PAGE_BYTES] = [what] * (size // PAGE_BYTES)
    return places[:count]


def eventually(condition):
    """Fails unless the condition comes true within five seconds."""
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_settled_mappings_are_what_was_asked_for(memory):
    """Read-write, read-only and guards; before `settle` only the table need say so."""
    memory.map(at(0), as_pages(3, 1))
    memory.map_readonly(at(2), as_pages(3))
    memory.map_guard(at(3), 7)
    assert memory.mapped(0, 11).tolist() == [3, 1, 3, *[GUARD] * 7, UNMAPPED]
    memory.settle()
    assert shown(memory, 11) == [3, 1, (3,), *[GUARD] * 7, UNMAPPED]
    assert memory.num_mappings == 10


def test_seven_guards_are_three_mappings(memory):
    """Of 4, 2 and 1 pages, so that any gap of a tile takes few calls."""
    memory.map_guard(at(1), 7)
    memory.settle()
    sizes = [size // PAGE_BYTES for address, (size, *_) in memory._driver.mappings.items()
             if memory._address <= address < memory._address + at(ARENA_PAGES)]  # fmt: skip
    assert sizes == [4, 2, 1]


def test_part_of_a_guard_is_refused(memory):
    """Its mapping is one; the whole can be replaced, also together with its neighbours."""
    memory.map(at(0), as_pages(0))
    memory.map_guard(at(1), 4)
    for call in (
        lambda: memory.unmap(at(2), 3),
        lambda: memory.unmap(at(0), 3),
        lambda: memory.map(at(4), as_pages(1)),
    ):
        with pytest.raises(ValueError, match="part of a guard"):
            call()
    memory.unmap(at(0), 5)
    memory.map_guard(at(0), 3)
    memory.map(at(3), as_pages(2))
    memory.settle()
    assert shown(memory, 5) == [GUARD, GUARD, GUARD, 2, UNMAPPED]


def test_neighbours_take_one_call_of_set_access(memory):
    """The dear call is made once a run, and once a kind of access."""
    calls = []
    set_access = memory._driver.set_access
    memory._driver.set_access = lambda *arguments, **options: (calls.append(1), set_access(*arguments, **options))
    memory.map(at(0), as_pages(0, 5, 2, 7))
    memory.settle()
    assert len(calls) == 1


def test_nothing_is_unmapped_before_the_streams_work_is_done(memory):
    """Kernels queued before `unmap` still find the page; afterwards it goes without anyone waiting for it."""
    memory.map(at(0), as_pages(0, 1))
    memory.settle()
    memory._driver.running.clear()
    memory.unmap(at(0), 1)
    memory.map(at(4), as_pages(2))
    memory.settle()
    time.sleep(0.02)
    assert shown(memory, 5) == [0, 1, UNMAPPED, UNMAPPED, 2]
    assert memory.mapped(0, 2).tolist() == [UNMAPPED, 1]
    memory._driver.running.set()
    eventually(lambda: shown(memory, 2) == [UNMAPPED, 1])


@pytest.mark.parametrize("unmapped", [True, False], ids=["unmapped_first", "replaced"])
def test_other_page_at_a_place_waits_for_the_stream(memory, unmapped):
    """`settle` returns when the new page is there, which is when nothing can use the old one any more."""
    memory.map(at(0), as_pages(0))
    memory.settle()
    memory._driver.running.clear()
    if unmapped:
        memory.unmap(at(0), 1)
    memory.map_readonly(at(0), as_pages(1))
    settling = threading.Thread(target=memory.settle)
    settling.start()
    time.sleep(0.02)
    assert settling.is_alive()
    assert shown(memory, 1) == [0]
    memory._driver.running.set()
    settling.join(5)
    assert shown(memory, 1) == [(1,)]


def test_same_page_again_stays_where_it_is(memory):
    """What was unmapped and mapped anew before the thread came to it costs nothing."""
    memory.map(at(0), as_pages(0))
    memory.settle()
    memory._driver.running.clear()
    memory.unmap(at(0), 1)
    memory.map(at(0), as_pages(0))
    memory.settle()
    assert shown(memory, 1) == [0]


def test_use_after_an_earlier_fence_needs_its_own(memory):
    """A place whose second page was used after the first one's event is not freed by that event."""
    completed = set()
    events = itertools.count()
    memory._driver.create_event = lambda: [None]
    memory._driver.record_event = lambda event, _: event.__setitem__(0, next(events))
    memory._driver.query_event = lambda event: event[0] in completed
    memory._driver.wait_event = lambda event: eventually(lambda: event[0] in completed)
    memory.map(at(0), as_pages(0))
    memory.settle()
    memory.unmap(at(0), 1)  # event 0
    memory.map(at(0), as_pages(1))
    completed.add(0)
    memory.settle()
    memory.unmap(at(0), 1)  # event 1
    time.sleep(0.02)
    assert shown(memory, 1) == [1]
    completed.update(range(1, 100))
    eventually(lambda: shown(memory, 1) == [UNMAPPED])


def test_pages_are_zeros_and_copied_through_home_addresses(memory):
    """Whatever the arena shows: new pages, zeroed ones, and the first bytes of another."""
    bytes_of = lambda page: memory._driver.memory[memory._handles[page]]  # noqa: E731  # looked up anew
    assert not any(bytes_of(page).any() for page in range(8))
    bytes_of(2)[:] = 9
    memory.copy(2, 3, 100)
    assert (bytes_of(3) == 9).sum() == 100
    memory.zero(as_pages(2, 3))
    assert not bytes_of(2).any()
    assert memory.home(3) - memory.home(2) == PAGE_BYTES


def test_release_waits_for_unmapping_and_gives_memory_back(memory):
    """The handle goes after the last mapping, and its number comes again."""
    memory.map(at(0), as_pages(2))
    memory.settle()
    with pytest.raises(ValueError, match="unmap them first"):
        memory.release(as_pages(2))
    memory._driver.running.clear()
    memory.unmap(at(0), 1)
    threading.Timer(0.02, memory._driver.running.set).start()
    memory.release(as_pages(2, 6))
    assert memory.physical_bytes == (6 + 7) * PAGE_BYTES == sum(map(len, memory._driver.memory.values()))
    assert memory.create(3) == [2, 6, 8]


def test_spare_pages_are_made_ahead_and_given_up_first():
    """Creation takes them at once; a device without memory gets them back before anyone is refused."""
    memory = make_memory(spare_pages=4)
    eventually(lambda: len(memory._spares) == 4)
    assert memory.physical_bytes == (8 + 4 + 7) * PAGE_BYTES
    memory._spare_pages = 0
    countdown = fail_call(memory._driver, "create")
    assert memory.create(2) == [8, 9]
    assert countdown.remaining == 1
    assert memory.create(4) == [10, 11, 12, 13]
    memory.check_integrity()
    assert not memory._spares
    memory.close()


def test_pages_beyond_the_bound_are_refused(memory):
    """There are home addresses for `max_pages` only."""
    with pytest.raises(MemoryRefused, match="max_pages=64"):
        memory.create(57)
    assert len(memory.create(56)) == 56


def test_page_size_must_fit_the_device():
    """The error names the value, the granularity and what would do."""
    with pytest.raises(ValueError, match=r"page_bytes=5000: must be a multiple of 4096 on this device; use 8192"):
        cuda.CudaMemory(5000, stream=0, driver=FakeDriver())


@pytest.mark.parametrize("call", ["create", "map", "set_access", "zero"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_refused_creation_leaves_everything_as_it_was(memory, call, nth):
    """Handles, homes and numbers of a batch go back, whichever call is refused."""
    countdown = fail_call(memory._driver, call, nth)
    before = memory.physical_bytes
    if call == "zero" and nth > 1:
        memory.create(3)
        assert countdown.remaining == nth - 1
        return
    with pytest.raises(MemoryRefused, match="refused by the test"):
        memory.create(3)
    assert memory.physical_bytes == before
    memory.check_integrity()
    assert memory.create(3) == [8, 9, 10]


@pytest.mark.parametrize("call", ["unmap", "release"])
def test_refused_release_keeps_the_pages(memory, call):
    """All are still there and can be used, whichever call is refused."""
    fail_call(memory._driver, call, 2)
    with pytest.raises(MemoryRefused):
        memory.release(as_pages(1, 4, 6))
    memory.check_integrity()
    assert memory.physical_bytes == 15 * PAGE_BYTES
    memory.release(as_pages(1, 4, 6))


@pytest.mark.parametrize("call", ["map", "set_access"])
@pytest.mark.parametrize("nth", [1, 2])
def test_refused_mapping_is_tried_again(memory, call, nth):
    """Refused once nobody notices; nothing half mapped stays in the way."""
    fail_call(memory._driver, call, nth)
    memory.map(at(0), as_pages(0, 1))
    memory.map_guard(at(2), 3)
    memory.settle()
    assert shown(memory, 5) == [0, 1, GUARD, GUARD, GUARD]


@pytest.mark.parametrize("call", ["map", "set_access"])
def test_refused_twice_is_told_and_tried_at_the_next_settling(memory, call):
    """The table keeps the wish; what can be mapped is, and a place given up is no longer wished for."""
    memory.settle()
    fail_call(memory._driver, call, times=2)
    memory.map(at(0), as_pages(0, 1))
    with pytest.raises(MemoryRefused, match="refused by the test"):
        memory.settle()
    eventually(lambda: shown(memory, 2) == [UNMAPPED, UNMAPPED])
    assert memory.mapped(0, 2).tolist() == [0, 1]
    memory.unmap(at(1), 1)
    memory.settle()
    assert shown(memory, 2) == [0, UNMAPPED]


@pytest.mark.parametrize("times", [1, 2])
def test_refused_unmapping_is_tried_again(memory, times):
    """By whoever needs the place or the page; until then it stays mapped and is not forgotten."""
    memory.map(at(0), as_pages(0))
    memory.settle()
    fail_call(memory._driver, "unmap", times=times)
    memory.unmap(at(0), 1)
    memory.map(at(0), as_pages(1))
    if times == 2:
        with pytest.raises(MemoryRefused):
            memory.settle()
    memory.settle()
    assert shown(memory, 1) == [1]
    memory.release(as_pages(0))


@pytest.mark.parametrize("call", ["create_event", "record_event", "query_event", "wait_event"])
def test_refused_event_only_delays(memory, call):
    """Unmapping never fails for its caller; the thread finds another moment of the stream to wait for."""
    memory.map(at(0), as_pages(0))
    memory.settle()
    memory._driver.running.clear()
    fail_call(memory._driver, call)
    memory.unmap(at(0), 1)
    memory.map(at(0), as_pages(1))
    threading.Timer(0.02, memory._driver.running.set).start()
    memory.settle()
    assert shown(memory, 1) == [1]


def test_lost_context_is_told_to_whoever_waits():
    """The thread ends, and so does every call that would wait for it; closing gives back nothing, silently."""
    memory = make_memory()

    def fault(*_):
        raise CudaFault("cuMemMap", "CUDA_ERROR_ILLEGAL_ADDRESS")

    memory._driver.map = fault
    memory.map(at(0), as_pages(0))
    with pytest.raises(CudaFault, match=r"cuMemMap failed: CUDA_ERROR_ILLEGAL_ADDRESS; .*restart the process"):
        memory.settle()
    with pytest.raises(CudaFault):
        memory.release(as_pages(1))
    memory.close()
    memory.close()


def test_view_is_the_whole_arena_made_once(memory):
    """Its first page, mapped for torch to see, is gone again."""
    assert memory.view(at(1), 100).shape == (100,)
    assert shown(memory, 1) == [UNMAPPED]
    with pytest.raises(ValueError, match="the arena has"):
        memory.view(at(47), PAGE_BYTES + 1)


places = st.integers(0, 20)
pages = st.lists(st.integers(0, 7), min_size=1, max_size=6)
steps = st.one_of(
    st.tuples(st.sampled_from(["map", "map_readonly"]), places, pages),
    st.tuples(st.just("unmap"), places, st.integers(1, 8)),
    st.tuples(st.just("map_guard"), places, st.integers(1, 9)),
    st.tuples(st.sampled_from(["settle", "stop", "run"]), st.just(0), st.just(0)),
)
failures = st.tuples(st.sampled_from(["map", "set_access", "unmap", "record_event", "query_event"]), st.integers(1, 12))


@settings(deadline=None, max_examples=60)
@given(steps=st.lists(steps, max_size=25), failure=failures)
def test_any_sequence_ends_as_a_list_of_places_says(steps, failure):
    """Random changes, a stream that stops and goes on, one refused call: settled places are as in a plain list."""
    memory, expected = make_memory(), [UNMAPPED] * ARENA_PAGES
    countdown = fail_call(memory._driver, *failure)
    for name, place, what in steps:
        if name in ("settle", "stop", "run"):
            memory._driver.running.clear() if name == "stop" else memory._driver.running.set()
            if name == "settle":
                memory.settle()
                assert [e for e in shown(memory) if e is not None] == shown(memory)
                assert all(a in (b, UNMAPPED) or b == UNMAPPED for a, b in zip(expected, shown(memory), strict=True))
            continue
        count = len(what) if isinstance(what, list) else what
        try:
            getattr(memory, name)(at(place), as_pages(*what) if isinstance(what, list) else what)
        except ValueError:
            assert GUARD in memory.mapped(0, ARENA_PAGES)
            continue
        new = {"map": what, "unmap": [UNMAPPED] * count, "map_guard": [GUARD] * count}
        expected[place : place + count] = new.get(name) or [(page,) for page in what]
    memory._driver.running.set()
    memory.check_integrity()
    memory.settle()
    assert shown(memory) == expected
    countdown.arm(NEVER)
    memory.close()


turns = st.tuples(
    st.sampled_from(["lease", "lease", "grow", "grow", "write", "guard", "unguard", "release", "drop", "shrink",
                     "settle", "settle"]),
    st.integers(0, 3),
    st.integers(1, 60),
)  # fmt: skip


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    turns=st.lists(turns, min_size=5, max_size=40),
    call=st.sampled_from(["create", "release", "map", "set_access", "unmap", "zero", "copy", "record_event"]),
    nth=st.integers(1, 40),
)
def test_store_on_it_stays_whole(turns, call, nth):
    """Sessions come and go, one driver call is refused: after settling, every leased row and guard can be accessed."""
    driver = FakeDriver()
    memory = cuda.CudaMemory(PAGE_BYTES, stream=0, driver=driver, spare_pages=2, max_pages=40)
    store = KVStore(
        make_layout(640), memory, budget_bytes=30 * PAGE_BYTES, max_tokens=64, max_ranges=3, fingerprint=b"m",
        tile_tokens=16, floor_bytes=0,
    )  # fmt: skip
    countdown = fail_call(driver, call, nth)
    leases = {}
    for name, session, number in turns:
        try:
            with contextlib.suppress(MemoryRefused) if name == "shrink" else contextlib.nullcontext():
                _take(store, leases, name, session, number)
        except OutOfPages:
            pass  # not now; nothing is half done
        store.check_integrity()
    store.settle()
    for lease in leases.values():
        _check_access(driver, memory, lease)
    countdown.arm(NEVER)
    store.close()
    assert not driver.mappings


def _take(store, leases, name, session, number):
    lease = leases.get(session)
    if name in ("shrink", "settle"):
        getattr(store, name)()
    elif lease is None:
        if name == "lease":
            leases[session] = store.lease(str(session), b"salt", [session // 2, *range(number)])
        elif name == "drop":
            store.drop_session(str(session))
    elif name == "write":
        count = min(number, lease.capacity_tokens - lease.kv_length)
        lease.commit([session // 2, *range(60)][lease.kv_length : lease.kv_length + count])
    elif name == "grow":
        lease.grow(number)
    elif name == "guard":
        lease.guard(min(number, lease.kv_length + 1))
    elif name == "unguard":
        lease.unguard()
    elif name == "release":
        leases.pop(session).release()


def _check_access(driver, memory, lease):
    """Every page of the lease's tensor can be read, those behind its complete ones written."""
    tensor = lease._tensor
    for index in range(len(tensor.pages)):
        _, handle, writable = driver.mappings[memory._address + tensor.offset + index * PAGE_BYTES]
        assert handle == memory._handles[int(tensor.pages.view[index])]
        assert writable or (writable is False and index < tensor.complete_pages)


def test_store_waits_when_nothing_can_be_mapped():
    """The request gives way; when the device maps again, the same lease goes on."""
    driver = FakeDriver()
    memory = cuda.CudaMemory(PAGE_BYTES, stream=0, driver=driver, spare_pages=0, max_pages=40)
    store = KVStore(
        make_layout(640), memory, budget_bytes=30 * PAGE_BYTES, max_tokens=64, max_ranges=3, fingerprint=b"m"
    )
    lease = store.lease("s", b"", [1, 2, 3])
    lease.grow(10)
    eventually(lambda: not memory._mapper._has_maps)
    fail_call(driver, "map", nth=2, times=2)
    lease.grow(16)
    with pytest.raises(OutOfMappings):
        store.settle()
    store.settle()
    _check_access(driver, memory, lease)
    store.check_integrity()
    store.close()
