"""The browser page: the files of `chatserve/static`, read and compressed once when the application is made.

Only these exact paths exist, so there is no path to traverse. They are built from `web/` by `make page`; without them
the server serves everything else, and `/` says how to build them.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

STATIC_DIRECTORY = Path(__file__).parent.parent / "static"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
ASSETS = "assets/"  # their names change with what is in them
MISSING = (
    "The page is not built: run 'make page' where the source is (it needs Node), or install a release of chatserve.\n"
)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self' ws: wss:; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def page_routes(directory: Path = STATIC_DIRECTORY) -> list[Route]:
    """A route for each file under `directory` with a known type; `index.html` is `/`, which exists in any case."""
    files = [path for path in sorted(directory.rglob("*")) if path.suffix in MEDIA_TYPES]
    routes = [_route(directory, path) for path in files]
    return routes if (directory / "index.html").exists() else [*routes, Route("/", _say_missing, methods=["GET"])]


def _route(directory: Path, path: Path) -> Route:
    name = path.relative_to(directory).as_posix()
    url_path = "/" if name == "index.html" else f"/{name}"
    caching = "public, max-age=31536000, immutable" if name.startswith(ASSETS) else "no-cache"
    return Route(url_path, _endpoint(path.read_bytes(), MEDIA_TYPES[path.suffix], caching), methods=["GET"])


async def _say_missing(request: Request) -> Response:
    return PlainTextResponse(MISSING, headers=HEADERS)


def _endpoint(content: bytes, media_type: str, caching: str) -> Callable[[Request], Awaitable[Response]]:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "Cache-Control": caching, "Vary": "Accept-Encoding", "ETag": etag}
    compressed = gzip.compress(content, mtime=0)

    async def serve_file(request: Request) -> Response:
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(compressed, media_type=media_type, headers={**headers, "Content-Encoding": "gzip"})
        return Response(content, media_type=media_type, headers=headers)

    return serve_file
