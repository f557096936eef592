"""A server of the benchmark's own: `chatserve serve` on a free port, timed to its ready line, ended afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STOP_TIMEOUT_S = 60.0
SERVE = ("chatserve", "serve")


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server listens; `pid` and `start_s` only of one that was started here."""

    url: str
    pid: int | None = None
    start_s: float | None = None

    def get(self, path: str, api_key: str | None) -> dict[str, Any]:
        """A GET request's JSON."""
        request = urllib.request.Request(self.url + path)
        if api_key:
            request.add_header("Authorization", f"Bearer {api_key}")
        with urllib.request.urlopen(request, timeout=30) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def cpu_s(self) -> dict[str, float]:
        """Seconds of processor time used so far by the front end and by its children, by what they are."""
        return {_label(pid, self.pid): _cpu_s(pid) for pid in self._pids()}

    def peak_rss_mib(self) -> dict[str, float]:
        """The most main memory each process has held."""
        return {_label(pid, self.pid): _peak_rss_mib(pid) for pid in self._pids()}

    def rss_kib(self) -> int:
        """The main memory that the front end holds now."""
        status = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    def num_files(self) -> int:
        """Files and sockets that the front end has open."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def children(self) -> list[int]:
        """The engine's and Redis's process ids."""
        paths = Path(f"/proc/{self.pid}/task").glob("*/children")
        return [int(pid) for path in paths for pid in path.read_text().split()]

    def wait(self) -> None:
        """Return when the server has ended."""
        while self.pid is not None and _is_running(self.pid):
            time.sleep(0.005)

    def _pids(self) -> list[int]:
        return [] if self.pid is None else [self.pid, *self.children()]


@contextlib.contextmanager
def started(
    arguments: Sequence[str], log: Path, program: Sequence[str] = SERVE, data_dir: Path | None = None
) -> Iterator[Server]:
    """A server with these arguments, its standard error in `log`; without a `data_dir` what it keeps goes with it."""
    with tempfile.TemporaryDirectory() as directory, log.open("ab") as stderr:
        command = [sys.executable, "-m", *program, "--port=0", f"--data-dir={data_dir or directory}/data", *arguments]
        began_s = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, stdin=subprocess.DEVNULL, env=_environment()
        ) as process:
            try:
                yield _ready(process, began_s, log)
            finally:
                _stop(process)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _environment() -> dict[str, str]:
    """Ours, with this source tree importable wherever the server runs."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}


def _ready(process: subprocess.Popen[bytes], began_s: float, log: Path) -> Server:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"the server did not start:\n{log.read_text()[-4000:]}")
    ready = json.loads(line)
    return Server(ready["url"], ready["pid"], time.perf_counter() - began_s)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _label(pid: int, server_pid: int | None) -> str:
    if pid == server_pid:
        return "front end"
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return "engine" if ".engine" in command else "redis" if "redis" in command else f"child {pid}"


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_rss_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM")), 0.0)
