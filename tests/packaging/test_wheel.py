"""Wheel and sdist as a person installs them: in an environment without this source tree, and without Node."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from chatserve.client import ChatClient
from tests.compose.project import fresh_clone
from tests.e2e.talking import new_session, reply_to
from tests.live import free_port

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]
NO_NODE = "/usr/sbin:/sbin"  # nothing of ours, no compiler, no node


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an sdist made from what a fresh clone has, and a wheel made from that sdist."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    fresh_clone(clone)
    run([sys.executable, "-m", "build", "--outdir", str(out), str(clone)])
    return out


@pytest.fixture(scope="module")
def python(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; its dependencies, which are large, are those installed here."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=True)
    made = home / "bin" / "python"
    run([str(made), "-m", "pip", "install", "--no-deps", "--no-index", str(only(dist.glob("*.whl")))])
    lent = Path(only(home.glob("lib/python3*/site-packages"))) / "lent.pth"
    lent.write_text(sysconfig.get_path("purelib") + "\n")
    return made


@pytest.fixture
def url(python: Path, tmp_path: Path) -> Iterator[str]:
    """A server of the installed package, started in an empty directory."""
    port = free_port()
    server = subprocess.Popen(
        [python, "-m", "chatserve", "serve", f"--port={port}", "--device=cpu"],
        cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        assert server.stdout.readline(), "the server ended instead of becoming ready"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.communicate(timeout=60)


def test_installed_package_is_the_wheels(python, tmp_path):
    """What is imported lies in the new environment, with both packages' types and the command."""
    script = "import chatserve, kvstore; print(chatserve.__file__, kvstore.__file__, sep='\\n')"
    done = subprocess.run(
        [python, "-c", script], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=True
    )
    packages = [Path(line).parent for line in done.stdout.split()]
    assert all(package.is_relative_to(python.parents[1]) for package in packages)
    assert all((package / "py.typed").is_file() for package in packages)
    assert (python.parent / "chatserve").is_file()


async def test_page_and_chat_are_served(url):
    """The page with every file that it names, and two turns of which the second needs the first."""
    await asyncio.to_thread(check_page, url)
    async with ChatClient(url) as client:
        session_id = await new_session(client)
        await reply_to(client, session_id, "My name is Zorvin.")
        assert "Zorvin" in (await reply_to(client, session_id, "What is my name?"))["text"]


def test_sdist_has_what_a_packager_needs(dist):
    """Sources, tests, license and pins; nothing hidden but CI's own, and no build of anything else."""
    with tarfile.open(only(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "csrc/attention.cpp", "chatserve/static/index.html"} <= names
    assert {"tests/live.py", "docs/design.md", "examples/kvstore_sharing.py", "compose.yaml"} <= names
    assert not [name for name in names if "node_modules" in name or "__pycache__" in name]


def check_page(url: str) -> None:
    """Every file that the page's head names is served."""
    page = httpx.get(url, trust_env=False)
    named = [part.partition('"')[0] for part in page.text.replace('src="', 'href="').split('href="')[1:]]
    files = [name for name in named if name.startswith(("/", "./"))]
    assert [name for name in files if ".js" in name]
    statuses = {name: httpx.get(httpx.URL(url + "/").join(name), trust_env=False).status_code for name in files}
    assert set(statuses.values()) == {200}, statuses


def environment(home: Path) -> dict[str, str]:
    """Almost nothing: neither this source tree nor Node can be found."""
    return {"PATH": NO_NODE, "HOME": str(home), "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}


def run(command: list[str]) -> None:
    """A command that has to go well; fails with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd="/")
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def only(found: Iterator[Path]) -> str:
    """The one path that was found."""
    (path,) = found
    return str(path)
