"""What the README shows is what the scripts print."""

from __future__ import annotations

from bench import sizing
from tests.live import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_sizing_table(capsys):
    """The table of tokens per GiB is the script's."""
    sizing.main([])
    assert capsys.readouterr().out in README


def test_sizing_reads_a_model(capsys):
    """A model directory adds a row: the bundled model has 6 layers, 2 heads of 64, in float32 6 KiB a token."""
    sizing.main(["--bytes-per-number", "4", str(ROOT / "chatserve" / "bundled" / "model")])
    assert capsys.readouterr().out.splitlines()[-1].startswith("| model | 6 | 174,762 |")
