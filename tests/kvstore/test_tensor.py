"""A session's tensor alone: growth in place, truncation, forks that share pages, guards for kernels that overread."""

from __future__ import annotations

import pytest

from kvstore import IntegrityError, MemoryRefused, VirtualTensor
from kvstore.memory import GUARD
from tests.kvstore.fakes import PAGE_BYTES, FlakyMemory, as_pages, make_layout

RANGE_PAGES = 12
LAYOUT = make_layout(640)  # 6.4 tokens a page


@pytest.fixture
def memory():
    """Two ranges of 12 pages, 10 pages created."""
    memory = FlakyMemory()
    memory.reserve(2 * RANGE_PAGES * PAGE_BYTES)
    memory.create(10)
    memory.create_guards()
    yield memory
    memory.check_integrity()
    memory.close()


def make_tensor(memory):
    return VirtualTensor(memory, LAYOUT, 0, RANGE_PAGES)


def row(memory, token, offset=0):
    return memory.view(offset + token * LAYOUT.token_bytes, LAYOUT.token_bytes)


def filled(memory, num_tokens, pages):
    """A tensor with rows that carry their token's number."""
    tensor = make_tensor(memory)
    tensor.extend(as_pages(*pages))
    for token in range(num_tokens):
        row(memory, token)[:] = token + 1
    tensor.num_tokens = num_tokens
    return tensor


def test_rows_stay_where_they_are_while_pages_are_added(memory):
    """Growth copies nothing: the same address, whatever pages come."""
    tensor = filled(memory, 6, [3])
    tensor.extend(as_pages(8, 9, 1))
    assert (tensor.capacity_tokens, tensor.num_runs) == (25, 3)
    assert [int(row(memory, token)[-1]) for token in range(6)] == [1, 2, 3, 4, 5, 6]
    tensor.check_integrity()


def test_truncate_keeps_the_pages_its_tokens_touch(memory):
    """The rest is unmapped; rows are forgotten, not erased."""
    tensor = filled(memory, 20, [0, 1, 2, 3])
    tensor.truncate(7)
    assert (tensor.num_tokens, tensor.pages.view.tolist()) == (7, [0, 1])
    tensor.truncate(9)
    assert tensor.num_tokens == 7
    tensor.check_integrity()


def test_cut_counts_only_tokens_wholly_inside(memory):
    """The token that straddles the cut is lost with its second half."""
    tensor = filled(memory, 20, [0, 1, 2, 3])
    tensor.cut(2)
    assert tensor.num_tokens == 12
    tensor.cut(0)
    assert (tensor.num_tokens, tensor.num_runs) == (0, 0)
    tensor.check_integrity()


def test_fork_shares_complete_pages_and_copies_the_boundary(memory):
    """The fork's writes behind its last token do not reach the original, nor the other way round."""
    tensor = filled(memory, 20, [0, 1, 2, 3])
    offset = RANGE_PAGES * PAGE_BYTES
    fork = tensor.fork(offset, 15, boundary_page=7)
    assert fork.pages.view.tolist() == [0, 1, 7]
    assert [int(row(memory, token, offset)[-1]) for token in range(15)] == list(range(1, 16))
    assert not memory.view(offset + 15 * LAYOUT.token_bytes, 3 * PAGE_BYTES - 15 * LAYOUT.token_bytes).any()
    row(memory, 15, offset)[:] = 99
    assert int(row(memory, 15)[0]) == 16
    fork.check_integrity()


def test_fork_at_a_page_boundary_copies_nothing(memory):
    """32 tokens of 640 bytes fill 5 pages exactly."""
    tensor = filled(memory, 33, [0, 1, 2, 3, 4, 5])
    fork = tensor.fork(RANGE_PAGES * PAGE_BYTES, 32)
    assert fork.pages.view.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="fork of 31 of 33 tokens: 3456 bytes need a boundary page"):
        tensor.fork(RANGE_PAGES * PAGE_BYTES, 31)
    with pytest.raises(ValueError, match="fork of 34 of 33"):
        tensor.fork(RANGE_PAGES * PAGE_BYTES, 34, boundary_page=7)


@pytest.mark.parametrize("nth", [1, 2])
def test_refused_fork_leaves_nothing_mapped(memory, nth):
    """Neither the borrowed pages nor the copy; the original does not notice."""
    tensor = filled(memory, 20, [0, 1, 2, 3])
    memory.countdown.arm(nth)
    with pytest.raises(MemoryRefused):
        tensor.fork(RANGE_PAGES * PAGE_BYTES, 15, boundary_page=7)
    assert (memory.mapped(RANGE_PAGES * PAGE_BYTES, RANGE_PAGES) == -1).all()
    tensor.check_integrity()


def test_replaced_pages_show_the_other_rows(memory):
    """The canonical page stands in the place of the duplicate."""
    tensor = filled(memory, 20, [0, 1, 2, 3])
    memory.copy(1, 5, PAGE_BYTES)
    tensor.replace(1, as_pages(5))
    assert tensor.pages.view.tolist() == [0, 5, 2, 3]
    assert [int(row(memory, token)[-1]) for token in range(20)] == list(range(1, 21))
    tensor.check_integrity()


def test_range_is_never_left(memory):
    """The neighbour's addresses are not ours to map."""
    tensor = filled(memory, 1, range(10))
    with pytest.raises(ValueError, match="3 more pages after 10: the range has 12"):
        tensor.extend(as_pages(0, 1, 2))
    tensor.check_integrity()


def test_guards_follow_the_last_page(memory):
    """Reads past the end find zeros as far as was asked for; the range's end is the end."""
    tensor = make_tensor(memory)
    tensor.extend(as_pages(0))
    tensor.guard(3)
    assert memory.mapped(0, 4).tolist() == [0, GUARD, GUARD, -1]
    tensor.guard(5)
    tensor.guard(2)
    assert memory.mapped(0, 6).tolist() == [0, GUARD, GUARD, GUARD, GUARD, -1]
    assert not memory.view(PAGE_BYTES, 4 * PAGE_BYTES).any()
    tensor.check_integrity()
    tensor.guard(RANGE_PAGES + 5)
    assert memory.mapped(RANGE_PAGES * PAGE_BYTES - PAGE_BYTES, 2).tolist() == [GUARD, -1]
    tensor.check_integrity()


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda tensor: tensor.unguard(), [0, 1]),
        (lambda tensor: tensor.borrow(as_pages(2, 3)), [0, 1, 2, 3]),
        (lambda tensor: tensor.cut(1), [0]),
        (lambda tensor: tensor.cut(2), [0, 1]),
        (lambda tensor: tensor.truncate(0), []),
    ],
    ids=["unguard", "grow", "cut", "cut_nothing", "truncate"],
)
def test_guards_go_with_any_change(memory, change, left):
    """No guard is left where the next page will be, nor behind the end."""
    tensor = make_tensor(memory)
    tensor.extend(as_pages(0, 1))
    tensor.guard(5)
    change(tensor)
    assert memory.mapped(0, 6).tolist() == left + [-1] * (6 - len(left))
    tensor.check_integrity()


def test_refused_growth_changes_nothing_but_guards(memory):
    """The pages are as they were, and may be guarded again."""
    tensor = make_tensor(memory)
    tensor.extend(as_pages(0))
    tensor.guard(3)
    memory.countdown.arm(1)
    with pytest.raises(MemoryRefused):
        tensor.extend(as_pages(1, 2, 3))
    assert memory.mapped(0, 6).tolist() == [0, -1, -1, -1, -1, -1]
    tensor.check_integrity()
    tensor.guard(3)
    tensor.check_integrity()


def test_refused_guard_changes_nothing(memory):
    """It can be asked for again."""
    tensor = make_tensor(memory)
    tensor.extend(as_pages(0))
    memory.countdown.arm(1)
    with pytest.raises(MemoryRefused):
        tensor.guard(3)
    tensor.check_integrity()
    tensor.guard(3)
    assert memory.mapped(0, 4).tolist() == [0, GUARD, GUARD, -1]


def test_foreign_mapping_is_found(memory):
    """The integrity check compares with memory, not with itself."""
    tensor = filled(memory, 3, [0, 1])
    memory.map(PAGE_BYTES, as_pages(5))
    with pytest.raises(IntegrityError, match="not mapped as its tensor says"):
        tensor.check_integrity()
