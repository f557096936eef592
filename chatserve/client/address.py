"""One server address, written as people write it, as the two URLs a client needs."""

from __future__ import annotations

from urllib.parse import urlsplit

_SECURE = {"http": False, "ws": False, "https": True, "wss": True}


def base_urls(url: str) -> tuple[str, str]:
    """The HTTP and the WebSocket base of a server; `localhost:8000` is taken as `http`. Raises ValueError."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in _SECURE or not parts.hostname:
        raise ValueError(f"{url!r} is not a server address; write http://HOST:PORT or https://HOST")
    rest = f"{parts.netloc}{parts.path.rstrip('/')}"
    secure = _SECURE[parts.scheme]
    return f"{'https' if secure else 'http'}://{rest}", f"{'wss' if secure else 'ws'}://{rest}"
