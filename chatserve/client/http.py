"""The HTTP side for programs that want an answer and no connection: sessions as lists, views and files. Blocking."""

from __future__ import annotations

import json
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from chatserve.client.address import base_urls
from chatserve.client.errors import CommandFailedError, ConnectionEndedError

TIMEOUT_S = 30.0


class NotReadyError(Exception):
    """The server answers, and says that it cannot serve now: `state` is what it says."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__("the server is not ready")
        self.state = state


class HttpApi:
    """A server's HTTP interface. Raises CommandFailedError when it refuses, ConnectionEndedError when it is away."""

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._url = base_urls(url)[0]
        self._timeout_s = timeout_s
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def list_sessions(self, *, limit: int = 50, before: str | None = None, search: str = "") -> list[dict[str, Any]]:
        """Sessions, newest first; `before` takes the id of the last one seen, `search` words that were said there."""
        optional = {"before": before, "search": search}
        query = {"limit": str(limit)} | {name: value for name, value in optional.items() if value}
        sessions: list[dict[str, Any]] = self._request("GET", f"/v1/sessions?{urlencode(query)}")["data"]
        return sessions

    def get_session(self, session_id: str) -> dict[str, Any]:
        """One session with its messages."""
        return self._request("GET", f"/v1/sessions/{quote(session_id, safe='')}")

    def delete_session(self, session_id: str) -> None:
        """Delete a session with everything it holds."""
        self._request("DELETE", f"/v1/sessions/{quote(session_id, safe='')}")

    def export_session(self, session_id: str, format: str = "json") -> bytes:
        """A session as a file: `json`, which `import_session` takes, or `markdown`."""
        return self._send("GET", f"/v1/sessions/{quote(session_id, safe='')}/export?{urlencode({'format': format})}")

    def import_session(self, document: bytes) -> dict[str, Any]:
        """A new session from an exported one; gives its view."""
        session: dict[str, Any] = json.loads(self._send("POST", "/v1/sessions/import", document))
        return session

    def readiness(self) -> dict[str, Any]:
        """What the server says of its parts at `/readyz`, ready or not."""
        try:
            state = self._request("GET", "/readyz")
        except NotReadyError as answer:
            state = answer.state
        if not isinstance(state.get("checks"), dict):
            raise ConnectionEndedError(0, f"{self._url} answers, but is no chatserve")
        return state

    def _request(self, method: str, path: str) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self._send(method, path))
        return body

    def _send(self, method: str, path: str, body: bytes | None = None) -> bytes:
        request = Request(self._url + path, method=method, headers=self._headers, data=body)
        if body is not None:
            request.add_header("Content-Type", "application/json")
        try:
            with urlopen(request, timeout=self._timeout_s) as response:
                answer: bytes = response.read()
        except HTTPError as error:
            with error:
                raise _refusal(error) from None
        except URLError as error:
            raise ConnectionEndedError(0, f"cannot connect to {self._url}: {error.reason}") from None
        except TimeoutError:
            raise ConnectionEndedError(0, f"{self._url} did not answer within {self._timeout_s:g} s") from None
        except (OSError, HTTPException) as error:
            raise ConnectionEndedError(0, f"{self._url} broke off its answer: {error}") from None
        return answer


def _refusal(error: HTTPError) -> Exception:
    try:
        answer = json.load(error)
        return NotReadyError(answer) if "ready" in answer else CommandFailedError(answer["error"])
    except (ValueError, KeyError, TypeError):  # some other server's error page
        return ConnectionEndedError(error.code, f"{error.url} answered with HTTP status {error.code}")
