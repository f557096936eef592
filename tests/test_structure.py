"""The direction of imports: who may know whom. An import that breaks a rule is a design decision, not an accident."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("kvstore/**/*.py"), *ROOT.glob("chatserve/**/*.py")])

# A library, and the only places of the product that may import it.
IMPORTERS = {
    "transformers": ("chatserve/pretrained.py", "chatserve/bundled/"),
    "redis": ("chatserve/storage/",),
    "safetensors": ("chatserve/model/weights.py", "chatserve/bundled/"),
    "prometheus_client": ("chatserve/server/metrics.py",),
    "starlette": ("chatserve/server/",),
    "uvicorn": ("chatserve/server/",),
    "websockets": ("chatserve/client/", "chatserve/server/"),
    "cuda": ("kvstore/driver.py", "chatserve/model/nvrtc.py"),
    "flashinfer": ("chatserve/model/flash.py",),
    "torch": ("kvstore/", "chatserve/model/", "chatserve/engine/", "chatserve/bundled/"),
    "rich": ("chatserve/cli/", "chatserve/server/console.py"),
}

# A package, and the packages it must not know.
FORBIDDEN = {
    "kvstore/": ("chatserve",),
    "chatserve/protocol/": (
        *("asyncio", "socket", "io", "os", "pathlib", "subprocess", "threading", "logging", "time", "websockets"),
        *("chatserve.sessions", "chatserve.server", "chatserve.storage", "chatserve.client", "chatserve.engine"),
    ),
    "chatserve/text/": ("chatserve.sessions", "chatserve.storage", "chatserve.engine", "chatserve.server"),
    "chatserve/model/": ("chatserve.engine", "chatserve.sessions", "kvstore"),
    "chatserve/engine/": ("chatserve.sessions", "chatserve.server", "chatserve.storage", "chatserve.protocol"),
    "chatserve/storage/": ("chatserve.sessions", "chatserve.server", "chatserve.engine"),
    "chatserve/sessions/": ("chatserve.server", "chatserve.cli", "chatserve.client"),
    "chatserve/client/": ("chatserve.server", "chatserve.sessions", "chatserve.engine", "torch"),
}


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module}
    return names


def is_inside(name: str, package: str) -> bool:
    """Whether module `name` is `package` or below it."""
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_their_direction(path):
    """Each heavy library has one importer, and no package knows those above it."""
    place = path.relative_to(ROOT).as_posix()
    for name in imports_of(path):
        for library, places in IMPORTERS.items():
            assert not is_inside(name, library) or place.startswith(places), f"{place} imports {name}"
        for package, strangers in FORBIDDEN.items():
            if place.startswith(package):
                assert not any(is_inside(name, stranger) for stranger in strangers), f"{place} imports {name}"
