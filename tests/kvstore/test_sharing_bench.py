"""The sharing benchmark measures what it says and fails when its aim is missed."""

from __future__ import annotations

from bench import sharing

SMALL = ["--sessions", "8", "--page-bytes", "4096", "--layers", "1", "--kv-heads", "1", "--head-dim", "80"]


def test_small_run_meets_the_aim(capsys):
    """Eight sessions of 256 + 128 tokens: one beginning in memory with sharing, eight without."""
    assert sharing.main([*SMALL, "--shared", "256", "--private", "128"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ratios = {line[:16].strip(): [float(word) for word in line[16:].split()] for line in lines[3:]}
    assert 1.0 <= ratios["with sharing"][1] == ratios["with sharing"][3] <= 1.1
    assert 2.3 <= ratios["without sharing"][1] <= 2.5
    assert ratios["with sharing"][4] == 256 * 7 / 8


def test_missed_aim_is_the_exit_status(capsys):
    """One private token each takes a page each: far above the bytes of the tokens."""
    assert sharing.main([*SMALL, "--shared", "32", "--private", "1"]) == 1
    assert "with sharing" in capsys.readouterr().out
