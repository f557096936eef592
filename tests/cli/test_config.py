"""`chatserve config show`: what would be in force, where it came from, and never a secret."""

import tomllib

import pytest

from chatserve.cli import main
from chatserve.errors import StartupError
from chatserve.settings import ServeSettings, load_settings


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """No file and no variables but the test's own."""
    monkeypatch.chdir(tmp_path)
    for name in ServeSettings.model_fields:
        monkeypatch.delenv(f"CHATSERVE_{name.upper()}", raising=False)


def shown(capsys, *flags):
    assert main.main(["config", "show", *flags]) == 0
    return capsys.readouterr().out


def test_sources(tmp_path, monkeypatch, capsys):
    """Each setting says whether a flag, the environment, the file or nobody gave it."""
    (tmp_path / "chatserve.toml").write_text("port = 1\nmax_waiting = 7\n")
    monkeypatch.setenv("CHATSERVE_PORT", "2")
    monkeypatch.setenv("chatserve_model", "environment")
    lines = shown(capsys, "--host=localhost").splitlines()
    for line in (
        'host = "localhost"  # flag',
        "port = 2  # environment",
        'model = "environment"  # environment',
        "max_waiting = 7  # chatserve.toml",
        'log_level = "info"  # default',
        "# max_context: the model's own",
    ):
        assert line in lines


def test_output_is_a_settings_file(tmp_path, capsys):
    """What is shown can be saved as `chatserve.toml`, and means the same."""
    flags = ["--port=7", "--kv-device-memory=1G", "--allowed-origin=https://a.example", "--session-ttl=30d"]
    text = shown(capsys, *flags)
    (tmp_path / "chatserve.toml").write_text(text)
    assert tomllib.loads(text)["kv_device_memory"] == 1 << 30
    settings = load_settings()
    assert (settings.port, settings.session_ttl_s) == (7, 30 * 86_400)
    assert settings.allowed_origins == ("https://a.example",)
    assert shown(capsys).count("# chatserve.toml") == text.count("# default") + text.count("# flag")


def test_secrets_are_hidden(tmp_path, monkeypatch, capsys):
    """Of keys the tenants are shown, of a Redis URL nothing."""
    (tmp_path / "keys").write_text("carol=carols-key-3 turns=2\n")
    monkeypatch.setenv("CHATSERVE_API_KEYS", "alice=alices-key,bob=bobs-key-2")
    text = shown(capsys, "--redis-url=redis://:hunter2@db/0", "--api-keys-file=keys")
    assert "# api_keys: those of alice, bob, from environment" in text
    for secret in ("alices-key", "bobs-key", "hunter2", "carols-key"):
        assert secret not in text


def test_bad_setting(capsys):
    """A bad value is explained as `serve` would."""
    assert main.main(["config", "show", "--port=abc"]) == 1
    assert "port = 'abc'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "d", "5w", "-1h", "1h30m"])
def test_bad_duration(text):
    """A time that cannot be read is refused with the flag to correct."""
    with pytest.raises(StartupError, match="--session-ttl"):
        load_settings({"session_ttl_s": text})
