"""The package stands alone: it imports numpy, torch and itself, and only where memory is."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import kvstore

MODULES = sorted(Path(kvstore.__file__).parent.glob("*.py"))


def imported_by(path):
    tree = ast.walk(ast.parse(path.read_text()))
    names = [[node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
             for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
    return {name.partition(".")[0] for group in names for name in group}


def test_store_needs_numpy_and_torch_only():
    """No model, no server, no Redis: usable with `import kvstore` alone."""
    needed = set().union(*map(imported_by, MODULES)) - sys.stdlib_module_names
    assert needed == {"kvstore", "numpy", "torch"}


def test_bookkeeping_knows_no_torch():
    """Pages, prefixes, eviction and leases are plain Python; torch names a dtype and views the arena."""
    users = {path.stem for path in MODULES if "torch" in imported_by(path)}
    assert users == {"layout", "memory", "posix"}


def test_only_one_module_calls_the_system():
    """ctypes is where addresses are made: the calls, and the view of the arena."""
    assert {path.stem for path in MODULES if "ctypes" in imported_by(path)} == {"linux", "posix"}
