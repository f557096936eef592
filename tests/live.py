"""A real server in a process of its own, as a person would start it."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 60.0


class LiveServer:
    """`chatserve serve` on a free port, ready. `log` is its standard error."""

    def __init__(self, data_dir: Path, *arguments: str, log: Path | None = None) -> None:
        self.data_dir = data_dir
        self.log = log or data_dir.with_suffix(".log")
        self._stderr = self.log.open("ab")
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "chatserve",
                "serve",
                "--port=0",
                "--device=cpu",
                f"--data-dir={data_dir}",
                *arguments,
            ],
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            stdin=subprocess.DEVNULL,
            env=server_environment(),
            cwd=data_dir.parent,
            start_new_session=True,
        )
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._reader = threading.Thread(target=self._read_stdout, daemon=True)
        self._reader.start()

    def _read_stdout(self) -> None:
        assert self.process.stdout
        with self.process.stdout as stdout:
            for line in stdout:
                self._lines.put(line)
        self._lines.put(b"")

    def wait_ready(self) -> LiveServer:
        """Wait for the ready line; fails with the log if the server ended instead."""
        line = self._lines.get(timeout=START_TIMEOUT_S)
        assert line, f"the server did not start:\n{self.log.read_text()}"
        self.ready: dict[str, Any] = json.loads(line)
        return self

    @property
    def url(self) -> str:
        """Where it listens."""
        return str(self.ready["url"])

    def stdout_rest(self) -> bytes:
        """What came on standard output after the ready line, once the server has ended."""
        rest = b""
        while line := self._lines.get(timeout=10):
            rest += line
        return rest

    def get(self, path: str, **options: Any) -> httpx.Response:
        """A GET request to it."""
        return httpx.get(self.url + path, trust_env=False, **options)

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        """Send a signal and wait for the end; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        self._stderr.close()
        return status


def server_environment() -> dict[str, str]:
    """The environment without settings of our own, with this source tree importable, and few threads."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CHATSERVE_")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return inherited | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_PROXY": "*"}


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
