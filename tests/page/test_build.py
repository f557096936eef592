"""The built page that is committed: made from the sources that lie beside it, small, and from nowhere else."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest

from chatserve.server.pages import STATIC_DIRECTORY
from tests.live import ROOT

WEB = ROOT / "web"
FILES = ["index.html", "package.json", "package-lock.json", "svelte.config.js", "tsconfig.json", "vite.config.ts"]
FIRST_LOAD_BYTES = 120 * 1024


def source_hash() -> str:
    """What `web/scripts/stamp.mjs` makes of the sources."""
    folders = [path for name in ("public", "scripts", "src") for path in (WEB / name).rglob("*") if path.is_file()]
    paths = sorted([*FILES, *(path.relative_to(WEB).as_posix() for path in folders)])
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.encode() + b"\0" + (WEB / path).read_bytes() + b"\0")
    return digest.hexdigest()


@pytest.mark.skipif(not WEB.exists(), reason="the page's sources are not in this distribution")
def test_build_is_of_these_sources():
    """Who changes `web/` runs `make page`, and commits both."""
    assert json.loads((STATIC_DIRECTORY / "build.json").read_text()) == {"sources": source_hash()}


def first_load() -> list[Path]:
    """The files that `/` names, and itself."""
    html = (STATIC_DIRECTORY / "index.html").read_text()
    return [STATIC_DIRECTORY / name for name in ("index.html", *re.findall(r'(?:src|href)="/([^"]+)"', html))]


def test_first_load_is_small():
    """What is loaded before anything can be done is at most 120 KB as it goes over the line."""
    assert len(first_load()) == 4
    assert sum(len(gzip.compress(path.read_bytes())) for path in first_load()) <= FIRST_LOAD_BYTES


def test_nothing_inline_and_nothing_from_elsewhere():
    """The page has no inline script or style, which the policy would refuse, and names no other host."""
    html = (STATIC_DIRECTORY / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|https?://", html)
    css = "".join(path.read_text() for path in STATIC_DIRECTORY.rglob("*.css"))
    assert not re.search(r"@import|url\(\s*['\"]?https?:", css)
