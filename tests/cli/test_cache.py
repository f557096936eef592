"""`chatserve cache`: what is in a page cache, whether it is sound, and its compaction, without a server."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest

from chatserve.cli import cache, main
from kvstore.disk import DiskTier
from tests.live import server_environment

PAGE_BYTES = 1024


def open_tier(path, fingerprint=b"model"):
    return DiskTier(path, budget_bytes=200_000, fingerprint=fingerprint, page_bytes=PAGE_BYTES)


@pytest.fixture
def path(tmp_path):
    """A cache with 50 pages."""
    path = tmp_path / "pages"
    with open_tier(path) as tier:
        tier.put([(hashlib.sha256(b"%d" % number).digest(), bytes(PAGE_BYTES)) for number in range(50)])
    return path


def run(capsys, *arguments):
    """The status and the lines of `chatserve cache`."""
    status = main.main(["cache", *map(str, arguments)])
    return status, capsys.readouterr().out


def contents(path):
    """All files, to see that they did not change."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "lock"}


def damage(path):
    """Change one byte of the first record's payload."""
    file = path / "00000001.seg"
    data = bytearray(file.read_bytes())
    data[200] ^= 1
    file.write_bytes(data)


def test_stats(path, capsys):
    """A table for people, which changes nothing."""
    before = contents(path)
    status, printed = run(capsys, "stats", "--dir", path)
    facts = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert status == 0
    assert (facts["directory"], facts["fingerprint"]) == (str(path), b"model".hex())
    assert (facts["page"], facts["records"], facts["budget"]) == ("1.0 KiB", "50", "195.3 KiB")
    assert contents(path) == before


def test_stats_as_json(path, capsys):
    """The same as an object, in bytes."""
    status, printed = run(capsys, "stats", "--dir", path, "--json")
    facts = json.loads(printed)
    assert status == 0
    assert (facts["records"], facts["page_bytes"], facts["budget_bytes"]) == (50, PAGE_BYTES, 200_000)
    assert facts["file_bytes"] == sum(file.stat().st_size for file in path.glob("*.seg"))
    assert (facts["rejected"], facts["fault"]) == ({}, None)


def test_verify(path, capsys):
    """A sound cache says how much was read, and changes nothing."""
    before = contents(path)
    assert run(capsys, "verify", "--dir", path) == (0, "50 records read, 0 places are bad.\n")
    assert contents(path) == before


def test_verify_finds_damage(path, capsys):
    """A record that is not what was written is named with its file, and the status is 1."""
    damage(path)
    status, printed = run(capsys, "verify", "--dir", path)
    assert status == 1
    assert f"BAD  {path}/00000001.seg at byte 64: checksum" in printed
    assert "50 records read, 1 places are bad." in printed
    status, printed = run(capsys, "verify", "--dir", path, "--json")
    (bad,) = json.loads(printed)["bad"]
    assert status == 1
    assert (bad["key"], bad["offset"], bad["reason"]) == (hashlib.sha256(b"0").hexdigest(), 64, "checksum")


def test_gc(path, capsys):
    """What another model left is deleted, what is wanted stays."""
    with open_tier(path, fingerprint=b"other") as tier:
        tier.put([(hashlib.sha256(b"other").digest(), bytes(PAGE_BYTES))])
    status, printed = run(capsys, "gc", "--dir", path, "--json")
    facts = json.loads(printed)
    assert (status, facts["records"]) == (0, 1)
    assert facts["freed_bytes"] > 50 * PAGE_BYTES
    assert facts["file_bytes"] < 2 * PAGE_BYTES
    status, printed = run(capsys, "gc", "--dir", path)
    assert (status, printed.splitlines()[0].split()) == (0, ["freed", "0", "B"])


@pytest.mark.parametrize("action", ["stats", "verify", "gc"])
def test_directory_in_use(path, action, capsys):
    """A directory that a server has open is refused with its name and what to do."""
    with open_tier(path):
        assert main.main(["cache", action, "--dir", str(path)]) == 1
    assert f"{path} is in use by the process" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["stats", "verify", "gc"])
def test_no_cache(tmp_path, action, capsys):
    """A directory that is none, or no cache, is refused and left as it is."""
    for directory in (tmp_path, tmp_path / "nowhere"):
        assert main.main(["cache", action, "--dir", str(directory)]) == 1
        assert f"cannot use {directory} as a page cache: it has no manifest" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["stats"], ["clean", "--dir", "x"]])
def test_bad_arguments(arguments, capsys):
    """What there is not is refused with a usage line."""
    with pytest.raises(SystemExit) as caught:
        main.main(["cache", *arguments])
    assert caught.value.code == 2
    assert "usage: chatserve cache" in capsys.readouterr().err


def test_help_starts_light():
    """Help and bad arguments need nothing that takes seconds to load."""
    code = f"import sys, {cache.__name__}; print(*(name for name in ('torch', 'numpy') if name in sys.modules))"
    environment = server_environment()
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert loaded.stdout.split() == []


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (-2048, "-2.0 KiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_size_text(num_bytes, text):
    """Bytes as people read them."""
    assert cache.size_text(num_bytes) == text
