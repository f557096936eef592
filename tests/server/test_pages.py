"""The page's files: what is served, how, and what is not."""

import pytest
from starlette.requests import Request

from chatserve.server.pages import page_routes

FILES = sorted(route.path for route in page_routes())
TYPES = {"": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


@pytest.mark.parametrize("path", FILES)
async def test_files(served, path):
    """Each file comes with its type and with headers that keep other people's scripts out."""
    async with served.http() as http:
        response = await http.get(path, headers={"Accept-Encoding": "identity"})
        again = await http.get(path, headers={"If-None-Match": response.headers["etag"]})
        zipped = await http.get(path, headers={"Accept-Encoding": "gzip"})
    assert response.status_code == 200
    assert response.headers["content-type"].split(";")[0] == TYPES[path.partition(".")[2]]
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self';" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert ("immutable" in response.headers["cache-control"]) == path.startswith("/assets/")
    assert (again.status_code, again.content) == (304, b"")
    assert (zipped.headers["content-encoding"], zipped.content) == ("gzip", response.content)


async def test_without_a_build(tmp_path):
    """A server whose page was not built says how to build it."""
    (route,) = page_routes(tmp_path)
    assert (route.path, route.methods) == ("/", {"GET", "HEAD"})
    response = await route.endpoint(Request({"type": "http", "headers": []}))
    assert b"make page" in response.body


@pytest.mark.parametrize(
    "path",
    [
        "/index.html/",
        "/../settings.py",
        "/%2e%2e/settings.py",
        "/..%2fsettings.py",
        "//etc/passwd",
        "/static/index.html",
        "/build.json",
    ],
)
async def test_other_paths(served, path):
    """Nothing beside the files exists, however the path is written."""
    async with served.http() as http:
        assert (await http.get(path)).status_code == 404


def test_only_known_types(tmp_path):
    """A file of an unknown type is not served, one in a folder is, under its path."""
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "icon.svg").write_text("<svg/>")
    (tmp_path / "notes.txt").write_text("not for the web")
    assert [route.path for route in page_routes(tmp_path)] == ["/assets/icon.svg", "/"]
