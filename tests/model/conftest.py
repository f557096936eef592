"""One torch thread for these tests: their tensors are tiny, and waiting for a second core costs more than it gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from chatserve.model.native import NativeUnavailable, load_kernel


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Restore the number of threads afterwards, for the other parts' tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["native", "sdpa"])
def attention_kind(request: pytest.FixtureRequest) -> str:
    """Both kinds of CPU attention in turn; the C++ one only where this machine can compile it."""
    found = load_kernel()
    if request.param == "native" and isinstance(found, NativeUnavailable):
        pytest.skip(str(found))
    return str(request.param)
