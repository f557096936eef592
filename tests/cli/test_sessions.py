"""`chatserve sessions export|import` and `chatserve healthcheck` against a running server."""

from __future__ import annotations

import http.server
import json
import threading

import httpx
import pytest

from chatserve.cli import main


@pytest.fixture
def session_id(live_server):
    """A session with one turn."""
    with httpx.Client(base_url=live_server.url, trust_env=False, timeout=30) as client:
        session = client.post("/v1/sessions", json={"title": "Pets"}).json()["id"]
        answer = client.post(f"/v1/sessions/{session}/responses", json={"input": "My dog is called Zorp."})
        assert answer.json()["response"]["status"] == "completed"
    return session


def test_search(live_server, session_id, capsys):
    """Sessions are found by what was said in them."""
    assert main.main(["sessions", "list", "--search", "dog ZORP", "--url", live_server.url]) == 0
    assert session_id in capsys.readouterr().out
    assert main.main(["sessions", "list", "--search", "dog unicorn", "--url", live_server.url]) == 0
    assert "There are no sessions" in capsys.readouterr().out


def test_export_and_import(live_server, session_id, tmp_path, capsysbinary):
    """What export writes, import takes, from a file; the new session says the same with the same token ids."""
    file, again = tmp_path / "pets.json", tmp_path / "again.json"
    assert main.main(["sessions", "export", session_id, "--output", str(file), "--url", live_server.url]) == 0
    assert main.main(["sessions", "import", str(file), "--url", live_server.url]) == 0
    imported = capsysbinary.readouterr().out.split()[-1].decode()
    assert imported.startswith("sess_")
    assert imported != session_id
    assert main.main(["sessions", "export", imported, "--output", str(again), "--url", live_server.url]) == 0
    one, two = json.loads(file.read_bytes()), json.loads(again.read_bytes())
    for field in ("text", "token_ids", "role", "state"):
        assert [message[field] for message in one["messages"]] == [message[field] for message in two["messages"]]
    assert one["messages"][0]["token_ids"]


def test_export_to_standard_output(live_server, session_id, capsysbinary):
    """Without a file name the session goes to standard output, as it came."""
    assert main.main(["sessions", "export", session_id, "--format=markdown", "--url", live_server.url]) == 0
    text = capsysbinary.readouterr().out.decode()
    assert text.startswith("# Pets\n")
    assert "## User\n\nMy dog is called Zorp.\n\n## Assistant" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["export", "sess_none"], "session_not_found"),
        (["import", "no-such-file.json"], "no-such-file.json"),
        (["export", "../../etc/passwd"], "not_supported"),
    ],
)
def test_refusals(live_server, arguments, expected, capsys):
    """What there is not is named, with status 1."""
    assert main.main(["sessions", *arguments, "--url", live_server.url]) == 1
    assert expected in capsys.readouterr().err


def test_import_of_something_else(live_server, tmp_path, capsys):
    """A file that is no exported session is refused with the place at fault."""
    file = tmp_path / "other.json"
    file.write_text('{"format": "chatserve.session"}')
    assert main.main(["sessions", "import", str(file), "--url", live_server.url]) == 1
    assert "version" in capsys.readouterr().err


def test_healthcheck(live_server, capsys):
    """A server that can serve is ready, with status 0."""
    assert main.main(["healthcheck", "--url", live_server.url]) == 0
    assert capsys.readouterr().out == "ready\n"


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (503, b'{"ready": false, "checks": {"engine": false, "storage": true}}', "not ready: engine"),
        (200, b'{"hello": "world"}', "is no chatserve"),
        (200, b"<html>", ""),
        (502, b"<html>", "502"),
    ],
)
def test_healthcheck_of_a_server_that_is_not_ready(status, body, expected, capsys):
    """What is missing is named; whatever else answers is not ready either."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert main.main(["healthcheck", "--url", f"http://127.0.0.1:{server.server_port}"]) == 1
    told = capsys.readouterr()
    assert expected in told.out + told.err
