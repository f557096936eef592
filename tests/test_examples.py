"""The examples run and show what they say."""

from __future__ import annotations

import runpy

from tests.live import ROOT


def test_kvstore_sharing(capsys):
    """The second session finds the shared beginning, the third turn its whole history; the README shows the same."""
    runpy.run_path(str(ROOT / "examples" / "kvstore_sharing.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed in (ROOT / "README.md").read_text(encoding="utf-8")
    found = [line.split(" tokens were there")[0] for line in printed.splitlines()]
    assert found == ["ann: 0 of 1100", "ben: 1000 of 1100", "ann: 1100 of 1120"]
