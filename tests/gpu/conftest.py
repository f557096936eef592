"""Tests that need a CUDA device; skipped without one."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Mark what is in this directory, and skip it on a machine without a GPU."""
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
