"""The package stands alone: it imports numpy, torch and itself, and only where memory is."""

from __future__ import annotations

import ast
import subprocess
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
    """No model, no server, no Redis: usable with `import kvstore` alone; CUDA is met in one module only."""
    needed = {path.stem: imported_by(path) - sys.stdlib_module_names for path in MODULES}
    assert set().union(*needed.values()) == {"kvstore", "numpy", "torch", "cuda"}
    assert [name for name in needed if "cuda" in needed[name]] == ["driver"]


def test_store_is_imported_without_cuda():
    """A machine without CUDA's bindings has the store, and its memory of POSIX."""
    code = "import sys; sys.modules['cuda'] = None; import kvstore; assert 'kvstore.driver' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bookkeeping_knows_no_torch():
    """Pages, prefixes, eviction and leases are plain Python; torch names a dtype and views the arena."""
    users = {path.stem for path in MODULES if "torch" in imported_by(path)}
    assert users == {"cuda", "driver", "layout", "memory", "posix"}


def test_only_one_module_calls_the_system():
    """ctypes is where addresses are made: the calls, and the view of the arena."""
    assert {path.stem for path in MODULES if "ctypes" in imported_by(path)} == {"linux", "posix"}
