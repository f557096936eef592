"""compose.yaml on a real engine: a fresh clone, built and started under a name of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import httpx

from tests.live import ROOT, free_port

SERVICE = "chatserve-cpu"
COMMANDS = (["docker", "compose"], ["docker-compose"])
BUILD_TIMEOUT_S = 1800
READY_TIMEOUT_S = 180.0


def compose_command() -> list[str] | None:
    """How `docker compose` is called here; None where there is no engine."""
    if not _succeeds(["docker", "info"]):
        return None
    return next((command for command in COMMANDS if _succeeds([*command, "version"])), None)


def _succeeds(command: list[str]) -> bool:
    found = shutil.which(command[0]) is not None
    return found and subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def fresh_clone(target: Path) -> None:
    """A `git clone` of this repository in the empty directory `target`, with what is not committed yet."""
    _git("clone", "--quiet", str(ROOT), str(target))
    changed = _git("diff", "--no-renames", "--name-only", "-z", "HEAD")
    added = _git("ls-files", "-z", "--others", "--exclude-standard")
    for name in filter(None, (changed + added).split("\0")):
        (target / name).unlink(missing_ok=True)
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


class ComposeProject:
    """The CPU profile and its Redis, reached at `url`. `TORCH_INDEX` in the environment is passed to the build."""

    def __init__(self, command: list[str], directory: Path) -> None:
        self._directory = directory
        self._command = [*command, "--project-name", f"chatserve-test-{os.getpid()}", "--profile", "cpu"]
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"

    def run(self, *arguments: str) -> str:
        """A compose command; fails with what it said."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("CHATSERVE_")}
        done = subprocess.run(
            [*self._command, *arguments], cwd=self._directory, capture_output=True, text=True,
            env=ours | {"CHATSERVE_PORT": str(self._port)}, timeout=BUILD_TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0, f"compose {' '.join(arguments)}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def up(self, *options: str) -> None:
        """Start both services and wait until they are healthy."""
        self.run("up", "--detach", *options, SERVICE, "redis")
        self.wait_healthy()

    def container(self, service: str) -> str:
        """The id of a service's container."""
        return self.run("ps", "-q", service).strip()

    def inspect(self, service: str, template: str) -> str:
        """What the engine knows of a service's container, by a Go template."""
        command = ["docker", "inspect", "--format", template, self.container(service)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    def wait_healthy(self) -> None:
        """Wait for the engine's health checks and for the published port; fails with the log."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._is_healthy():
            assert time.monotonic() < deadline, f"not healthy:\n{self.run('logs', '--tail=50')}"
            time.sleep(0.5)

    def _is_healthy(self) -> bool:
        health = {self.inspect(service, "{{.State.Health.Status}}") for service in (SERVICE, "redis")}
        return health == {"healthy"} and self._is_ready()

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False
