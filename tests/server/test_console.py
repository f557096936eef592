"""The block that an operator reads when the server is ready."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from chatserve.server.console import print_summary, summary
from chatserve.settings import load_settings
from tests.server.fakes import INFO

LINES = ["URL", "Model", "Attention", "Capacity", "Tiers", "Sessions", "Auth"]


@pytest.mark.parametrize(
    ("settings", "auth"),
    [
        ({}, "off, this machine only"),
        ({"api_keys": ("alice=alices-key",)}, "on, 1 key"),
        ({"api_keys": ("alice=alices-key", "bob=bobs-key-2")}, "on, 2 keys"),
        ({"host": "0.0.0.0", "insecure": True}, "OFF, open to everyone who reaches this address"),
    ],
)
def test_auth(settings, auth):
    """Who may come in is said plainly."""
    assert dict(summary("http://x", load_settings(settings), INFO))["Auth"] == auth


def test_summary(tmp_path):
    """A line each for what an operator has to know, never wrapped, without keys or passwords."""
    output = io.StringIO()
    settings = load_settings({"redis_url": "redis://:hunter2@db/0", "api_keys": ("alice=alices-key",)})
    print_summary(Console(file=output, width=40), "http://127.0.0.1:8000", settings, INFO)
    lines = output.getvalue().splitlines()
    assert [line.split()[0] for line in lines[1:]] == LINES
    assert "http://127.0.0.1:8000" in lines[1]
    assert "100,000 tokens" in lines[4]
    assert "hunter2" not in output.getvalue()
    assert "alices-key" not in output.getvalue()


@pytest.mark.parametrize(
    ("tiers", "line"),
    [
        ((0, 0), "none: a history that leaves the device is computed again"),
        ((256 << 20, 0), "below it 0.25 GiB of main memory, no disk"),
        ((16 << 30, 64 << 30), "below it 16.00 GiB of main memory, 64.00 GiB of disk in /data/kv"),
    ],
)
def test_tiers(tiers, line):
    """How much lies below the device, and where on disk."""
    info = replace(INFO, host_bytes=tiers[0], disk_bytes=tiers[1])
    assert dict(summary("http://x", load_settings({"data_dir": "/data"}), info))["Tiers"] == line
