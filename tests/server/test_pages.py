"""The page's files: what is served, how, and what is not."""

import pytest

from chatserve.server.pages import page_routes


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/app.js", "text/javascript; charset=utf-8"),
        ("/style.css", "text/css; charset=utf-8"),
    ],
)
async def test_files(served, path, media_type):
    """Each file comes with its type and with headers that keep other people's scripts out."""
    async with served.http() as http:
        response = await http.get(path)
        again = await http.get(path, headers={"If-None-Match": response.headers["etag"]})
    assert (response.status_code, response.headers["content-type"]) == (200, media_type)
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path",
    ["/index.html/", "/../settings.py", "/%2e%2e/settings.py", "/..%2fsettings.py", "//etc/passwd", "/static/app.js"],
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
    assert [route.path for route in page_routes(tmp_path)] == ["/assets/icon.svg"]
