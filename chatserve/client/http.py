"""The HTTP side for programs that want an answer and no connection: list, show and delete sessions. Blocking."""

from __future__ import annotations

import json
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from chatserve.client.address import base_urls
from chatserve.client.errors import CommandFailedError, ConnectionEndedError

TIMEOUT_S = 30.0


class HttpApi:
    """A server's HTTP interface. Raises CommandFailedError when it refuses, ConnectionEndedError when it is away."""

    def __init__(self, url: str, *, token: str | None = None) -> None:
        self._url = base_urls(url)[0]
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def list_sessions(self, *, limit: int = 50, before: str | None = None) -> list[dict[str, Any]]:
        """Sessions, newest first; `before` takes the id of the last one seen."""
        query = {"limit": str(limit)} | ({} if before is None else {"before": before})
        sessions: list[dict[str, Any]] = self._request("GET", f"/v1/sessions?{urlencode(query)}")["data"]
        return sessions

    def get_session(self, session_id: str) -> dict[str, Any]:
        """One session with its messages."""
        return self._request("GET", f"/v1/sessions/{quote(session_id, safe='')}")

    def delete_session(self, session_id: str) -> None:
        """Delete a session with everything it holds."""
        self._request("DELETE", f"/v1/sessions/{quote(session_id, safe='')}")

    def _request(self, method: str, path: str) -> dict[str, Any]:
        request = Request(self._url + path, method=method, headers=self._headers)
        try:
            with urlopen(request, timeout=TIMEOUT_S) as response:
                body: dict[str, Any] = json.load(response)
        except HTTPError as error:
            with error:
                raise _refusal(error) from None
        except URLError as error:
            raise ConnectionEndedError(0, f"cannot connect to {self._url}: {error.reason}") from None
        except TimeoutError:
            raise ConnectionEndedError(0, f"{self._url} did not answer within {TIMEOUT_S:g} s") from None
        return body


def _refusal(error: HTTPError) -> Exception:
    try:
        return CommandFailedError(json.load(error)["error"])
    except (ValueError, KeyError, TypeError):  # some other server's error page
        return ConnectionEndedError(error.code, f"{error.url} answered with HTTP status {error.code}")
