"""What an operator sets reaches the server: a keys file with limits, retention, the data directory."""

from __future__ import annotations

import stat
import time

import httpx

from chatserve.cli import main

KEYS = "# two tenants\nalice=alices-key sessions=1\nbob=bobs-key-2\n"


def test_keys_file_limits_and_retention(start_server, tmp_path, capsys):
    """Keys and their limits come from the file, unused sessions go, and neither log nor directory shows a key."""
    (tmp_path / "keys").write_text(KEYS)
    server = start_server(f"--api-keys-file={tmp_path / 'keys'}", "--session-ttl=1s", "--log-level=debug")
    with httpx.Client(base_url=server.url, trust_env=False, headers={"Authorization": "Bearer alices-key"}) as alice:
        assert alice.post("/v1/sessions").status_code == 201
        assert alice.post("/v1/sessions").json()["error"]["code"] == "rate_limited"
        deadline = time.monotonic() + 20
        while alice.get("/v1/sessions").json()["data"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert alice.post("/v1/sessions").status_code == 201
        assert alice.get("/openapi.json").json()["info"]["title"] == "chatserve"
    assert server.get("/v1/sessions").status_code == 401
    assert main.main(["healthcheck", "--url", server.url]) == 0
    assert stat.S_IMODE(server.data_dir.stat().st_mode) == 0o700
    assert (server.data_dir / "format").read_text() == "1\n"
    assert server.stop() == 0
    log = server.log.read_text()
    assert "deleted sessions that were not used" in log
    assert "alices-key" not in log
    kept = [path for path in server.data_dir.rglob("*") if path.is_file()]
    assert kept
    assert not any(b"alices-key" in path.read_bytes() for path in kept)
