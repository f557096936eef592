"""Token, byte and page arithmetic against counting bytes one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore import KVLayout, default_page_bytes
from tests.kvstore.fakes import make_layout

layouts = st.builds(
    KVLayout,
    num_layers=st.integers(1, 3),
    num_kv_heads=st.integers(1, 2),
    head_dim=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    page_bytes=st.sampled_from([4, 12, 16, 64, 100]),
)


@given(layout=layouts, num_tokens=st.integers(0, 40))
def test_pages_of_tokens_are_those_their_bytes_lie_in(layout, num_tokens):
    """A page is touched by the bytes in it and complete when there is no byte beyond them."""
    touched = {byte // layout.page_bytes for byte in range(num_tokens * layout.token_bytes)}
    assert layout.pages_for(num_tokens) == len(touched)
    used = num_tokens * layout.token_bytes
    complete = [page for page in touched if (page + 1) * layout.page_bytes <= used]
    assert layout.complete_pages(num_tokens) == len(complete)
    assert layout.boundary_bytes(num_tokens) == used - len(complete) * layout.page_bytes


@given(layout=layouts, num_pages=st.integers(0, 40))
def test_tokens_of_pages_are_those_wholly_inside(layout, num_pages):
    """`complete_tokens` rounds down, `tokens_to_fill` up, and each undoes the other's page count."""
    available = num_pages * layout.page_bytes
    tokens = range(available // layout.token_bytes + 2)
    assert layout.complete_tokens(num_pages) == max(n for n in tokens if n * layout.token_bytes <= available)
    assert layout.tokens_to_fill(num_pages) == min(n for n in tokens if n * layout.token_bytes >= available)
    assert layout.complete_pages(layout.tokens_to_fill(num_pages)) >= num_pages
    assert layout.pages_for(layout.complete_tokens(num_pages)) <= num_pages


@given(layout=layouts, max_tokens=st.integers(1, 100), tile_tokens=st.integers(0, 20))
def test_range_is_whole_pages_and_whole_kernel_blocks(layout, max_tokens, tile_tokens):
    """Neighbouring ranges begin on a page, and on a token whose number is a multiple of 16."""
    num_bytes = layout.range_bytes(max_tokens, tile_tokens)
    assert num_bytes % layout.page_bytes == 0
    assert num_bytes % (16 * layout.token_bytes) == 0
    assert num_bytes >= (max_tokens + tile_tokens) * layout.token_bytes


def test_known_models_have_the_documented_sizes():
    """Llama-3-8B in bf16 has 16 tokens in 2 MiB, Qwen3-8B 14 and a part."""
    llama = KVLayout(32, 8, 128, torch.bfloat16, 2 << 20)
    qwen = KVLayout(36, 8, 128, torch.bfloat16, 2 << 20)
    assert (llama.token_bytes, llama.complete_tokens(1)) == (128 * 1024, 16)
    assert (qwen.complete_tokens(1), qwen.tokens_to_fill(1), qwen.boundary_bytes(15)) == (
        14,
        15,
        15 * 147456 - (2 << 20),
    )


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_dim", "page_bytes"])
def test_size_that_is_not_positive_is_refused_by_name(field):
    """The error names the field."""
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "dtype": torch.float32, "page_bytes": 64} | {field: 0}
    with pytest.raises(ValueError, match=f"{field}=0"):
        KVLayout(**sizes)


def test_page_that_splits_a_number_is_refused():
    """A float must not straddle pages of different sessions."""
    with pytest.raises(ValueError, match="page_bytes=66"):
        KVLayout(1, 1, 8, torch.float32, 66)


def test_layouts_of_the_fakes_cover_both_kinds():
    """Among the sizes the other tests use are tokens smaller and larger than a page, dividing it and not."""
    kinds = {(4096 % size == 0, size > 4096, size % 4096 == 0) for size in (384, 1024, 10240, 12288)}
    assert len(kinds) == 4
    assert make_layout(384).complete_tokens(1) == 10


@pytest.mark.parametrize(
    ("budget_bytes", "page_bytes"),
    [(1, 65536), (2 << 30, 65536), ((2 << 30) + 1, 131072), (64 << 30, 2 << 20), (1 << 40, 32 << 20)],
)
def test_default_page_grows_with_the_budget(budget_bytes, page_bytes):
    """Never more than 32,768 pages, so that their mappings stay under Linux's bound."""
    assert default_page_bytes(budget_bytes) == page_bytes
