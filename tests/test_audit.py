"""`make audit`: a known vulnerability fails it, what cannot be looked up does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "audit.py"
GOOD = {"name": "good", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "ours", "version": "1.0", "skip_reason": "not on PyPI"}
BAD = {"name": "bad", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}


@pytest.mark.parametrize(
    ("answer", "status", "expected"),
    [
        (json.dumps({"dependencies": [GOOD, UNKNOWN]}), 0, "1 packages looked up, 1 unknown, 0 vulnerabilities"),
        (json.dumps({"dependencies": [GOOD, BAD]}), 1, "bad 1.0: PYSEC-1, mended in 1.1"),
        ("Traceback: no network", 0, "skipped"),
        ("", 0, "skipped"),
    ],
)
def test_audit(tmp_path, answer, status, expected):
    """The exit status is about vulnerabilities alone."""
    (tmp_path / "pip_audit.py").write_text(f"import sys; sys.stdout.write({answer!r}); sys.exit(1)")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (status, "")
    assert expected in done.stdout
