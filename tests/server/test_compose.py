"""Starting fails early and clearly, and leaves nothing behind."""

from types import SimpleNamespace

import pytest

from chatserve.engine import defaults
from chatserve.errors import StartupError
from chatserve.server.compose import compose, engine_config, session_priority
from chatserve.server.listener import bind, url_of
from chatserve.settings import load_settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"redis_url": "redis://:hunter2@127.0.0.1:1/0"}, r"redis://127\.0\.0\.1:1/0.*--redis-url"),
        ({"redis_url": "http://127.0.0.1:1"}, r"http://127\.0\.0\.1:1"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
)
async def test_cannot_start(tmp_path, settings, expected):
    """The error names the value at fault and the remedy, and no password."""
    with pytest.raises(StartupError, match=expected) as caught:
        async with compose(load_settings({"data_dir": tmp_path / "data", **settings}), lambda what: None):
            pass
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("host", ["198.51.100.7", "no-such-host.invalid"])
def test_cannot_bind(host):
    """An address of another machine cannot be listened on."""
    with pytest.raises(StartupError, match=f"{host}.*--host"):
        bind(host, 0)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("example.org", "http://example.org:80"),
    ],
)
def test_url(host, url):
    """The URL that is announced can be opened on this machine."""
    assert url_of(host, 80) == url


def test_engine_config():
    """Settings reach the engine in its own terms."""
    config = engine_config(
        load_settings(
            {"device": "cuda", "dtype": "bfloat16", "load_format": "dummy", "max_context": "2k",
             "kv_device_memory": "64M", "max_running": "3", "max_step_tokens": "1k"}
        )
    )  # fmt: skip
    assert (config.device, config.dtype, config.load_format) == ("cuda", "bfloat16", "dummy")
    assert (config.max_context, config.kv_device_bytes) == (2048, 64 << 20)
    assert (config.max_running, config.max_step_tokens) == (3, 1024)


def test_engine_decides():
    """What nobody set is left open: the engine knows the device."""
    config = engine_config(load_settings())
    assert (config.device, config.dtype, config.load_format) == ("auto", "auto", "auto")
    assert (config.kv_device_bytes, config.max_running, config.max_step_tokens) == (None, None, None)


def test_defaults_by_device(tmp_path, monkeypatch):
    """A quarter of the memory allowed, at most 4 GiB, on the CPU; nine tenths of what is free on a GPU."""
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(defaults, "_CGROUP_LIMIT", limit)
    limit.write_text(f"{1 << 30}\n")
    assert defaults.host_kv_bytes() == 1 << 28
    limit.write_text("max\n")
    assert 0 < defaults.host_kv_bytes() <= 4 << 30
    assert defaults.gpu_kv_bytes(100 << 30) == 90 << 30
    assert defaults.default_limits("cpu").max_running < defaults.default_limits("cuda").max_running


def test_disk_space_by_default(monkeypatch, tmp_path):
    """A quarter of what is free, its own files included, up to a bound by device; none where that is next to none."""
    free = {"bytes": 1 << 40}
    monkeypatch.setattr(defaults.shutil, "disk_usage", lambda path: SimpleNamespace(free=free["bytes"]))
    directory = tmp_path / "data" / "kv"
    assert defaults.disk_tier_bytes("cpu", directory) == 4 << 30
    assert defaults.disk_tier_bytes("cuda", directory) == 64 << 30
    free["bytes"] = 8 << 30
    assert defaults.disk_tier_bytes("cuda", directory) == 2 << 30
    directory.mkdir(parents=True)
    (directory / "00000001.seg").write_bytes(bytes(1 << 20))
    assert defaults.disk_tier_bytes("cuda", directory) == (2 << 30) + (1 << 18)
    free["bytes"] = 3 << 30
    assert defaults.disk_tier_bytes("cuda", directory) == 0


def test_priorities_of_tenants(tmp_path):
    """Those behind the keys; whose key has none, and who is no tenant, have none."""
    (tmp_path / "keys").write_text("alice=alices-key priority=2\nbob=bobs-key-2\n")
    priority_of = session_priority(load_settings({"api_keys_file": str(tmp_path / "keys")}))
    assert [priority_of(tenant) for tenant in ("alice", "bob", "local")] == [2, 0, 0]
