"""Servers for the end-to-end tests: one that many tests share, and as many as one test wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.live import LiveServer

StartServer = Callable[..., LiveServer]


@pytest.fixture(scope="session")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with the bundled model and default settings; tests make their own sessions in it."""
    server = LiveServer(tmp_path_factory.mktemp("live") / "data")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Start servers: `start_server("--api-key=secret-one")`. The same data directory unless `data_dir` is given."""
    started: list[LiveServer] = []

    def start(*arguments: str, data_dir: Path | None = None, log: Path | None = None, wait: bool = True) -> LiveServer:
        server = LiveServer(data_dir or tmp_path / "data", *arguments, log=log)
        started.append(server)
        return server.wait_ready() if wait else server

    yield start
    for server in started:
        server.stop()
