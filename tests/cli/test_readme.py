"""What the README shows must work, and what it lists must be there."""

import re
import subprocess
import sys
from pathlib import Path

from chatserve.settings import ServeSettings, flag_of
from tests.live import server_environment

README = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")


def test_python_example(live_server):
    """The example prints a reply and what it reused, as it stands but for the address."""
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert "http://127.0.0.1:8000" in example
    program = example.replace("http://127.0.0.1:8000", live_server.url)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=server_environment()
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\ncached tokens: \d+\n.*Zorp", done.stdout)


def test_flags():
    """Each flag that the table names is one, and those that most people need are in it."""
    flags = {flag_of(name) for name in ServeSettings.model_fields}
    cells = re.findall(r"^\| (`--[^|]*(?:\\\|[^|]*)*) \|", README, re.MULTILINE)
    named = {flag for cell in cells for flag in re.findall(r"--[a-z-]+", cell)}
    assert named <= flags
    assert {"--host", "--port", "--model", "--data-dir", "--redis-url", "--kv-device-memory", "--api-key"} <= named
