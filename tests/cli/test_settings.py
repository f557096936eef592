"""Where settings come from, what they accept, and how a bad one is explained."""

import pytest

from chatserve.api_keys import TenantLimits, hash_key, parse_api_key
from chatserve.cli import serve
from chatserve.errors import StartupError
from chatserve.settings import ServeSettings, is_loopback, load_settings, parse_duration, parse_size


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """No file and no variables but the test's own."""
    monkeypatch.chdir(tmp_path)
    for name in ServeSettings.model_fields:
        monkeypatch.delenv(f"CHATSERVE_{name.upper()}", raising=False)


def from_flags(*flags):
    return load_settings(vars(serve.parser().parse_args(flags)))


def test_defaults():
    """Without anything set: this machine only, the bundled model, data beside us."""
    settings = load_settings()
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8000, "bundled")
    assert (str(settings.data_dir), settings.redis_url, settings.device) == ("chatserve-data", None, "auto")
    assert (settings.dtype, settings.load_format) == ("auto", "auto")
    assert (settings.kv_device_memory, settings.max_running, settings.max_step_tokens) == (None, None, None)
    assert settings.keys == ()


def test_order_of_sources(tmp_path, monkeypatch):
    """A flag goes before the environment, that before the file, that before the default."""
    (tmp_path / "chatserve.toml").write_text('port = 1\nmodel = "file"\nmax_context = "8k"\n')
    monkeypatch.setenv("CHATSERVE_PORT", "2")
    monkeypatch.setenv("CHATSERVE_MODEL", "environment")
    settings = from_flags("--port", "3")
    assert (settings.port, settings.model, settings.max_context) == (3, "environment", 8192)


def test_every_field_has_a_flag():
    """Each setting can be given on the command line, with help and in a group."""
    text = serve.parser().format_help()
    for name, field in ServeSettings.model_fields.items():
        assert field.description, name
        assert "--" in text
    flags = {action.dest for action in serve.parser()._actions}
    assert set(ServeSettings.model_fields) <= flags


@pytest.mark.parametrize(
    ("text", "size"),
    [("32k", 32768), ("4G", 4 << 30), ("1.5g", 3 << 29), ("2GiB", 2 << 30), ("512 mb", 512 << 20), ("100", 100)],
)
def test_sizes(text, size):
    """Sizes read as people write them, in powers of 1,024."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "4X", "-1G", "1e3", "4G4", "0x10"])
def test_bad_sizes(text):
    """Anything else is refused with the flag to correct."""
    with pytest.raises(StartupError, match="--kv-device-memory"):
        load_settings({"kv_device_memory": text})


@pytest.mark.parametrize(
    ("text", "seconds"), [("30d", 2_592_000), ("12h", 43_200), ("1.5m", 90), ("45s", 45), ("600", 600), (" 2 H ", 7200)]
)
def test_durations(text, seconds):
    """Times read as people write them."""
    assert parse_duration(text) == seconds


def test_keys_file(tmp_path):
    """A file has a key a line, itself or hashed, with limits of its own over those of the settings."""
    file = tmp_path / "keys"
    digest = hash_key("carols-key-3")
    file.write_text(
        "# who may\n\nalice=alices-key turns=4 sessions=10\n"
        f"  carol=sha256:{digest.hex()}  tokens_per_minute=500 priority=2\n"
    )
    settings = load_settings({"api_keys": ("bob=bobs-key-2",), "api_keys_file": str(file), "key_max_turns": "2"})
    limits = {key.tenant: key.limits for key in settings.keys}
    assert limits == {
        "bob": TenantLimits(None, 2, None),
        "alice": TenantLimits(10, 4, None),
        "carol": TenantLimits(None, 2, 500, 2),
    }
    assert {key.digest for key in settings.keys} >= {digest, hash_key("alices-key")}
    assert "alices-key" not in repr(settings)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read"),
        ("", "has no keys"),
        ("alice=short", "line 1"),
        ("a=secret-one\nb=secret-two turns=0", "line 2.*turns"),
        ("a=secret-one speed=3", "tokens_per_minute"),
        ("a=sha256:abc", "64 hexadecimal"),
        ("a=secret-one\nb=secret-one", "given twice"),
        ("bob=secret-two", "given twice"),
    ],
)
def test_bad_keys_file(tmp_path, content, expected):
    """A keys file at fault is named with its line, and never quoted."""
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(StartupError, match=expected) as caught:
        load_settings({"api_keys": ("bob=bobs-key-2",), "api_keys_file": str(file)})
    assert not any(secret in str(caught.value) for secret in ("secret-", "=short"))


def test_keys_file_opens_the_server(tmp_path):
    """A keys file counts as keys beyond this machine."""
    (tmp_path / "keys").write_text("alice=alices-key")
    assert load_settings({"host": "0.0.0.0", "api_keys_file": str(tmp_path / "keys")}).keys


def test_engine_flags():
    """What the engine is to do comes from flags as people write them."""
    settings = from_flags("--device=cuda", "--dtype=bfloat16", "--load-format=dummy", "--max-step-tokens=4k")
    assert (settings.device, settings.dtype, settings.load_format) == ("cuda", "bfloat16", "dummy")
    assert settings.max_step_tokens == 4096


def test_help_shows_percent_signs():
    """A percent sign in a description or default reaches the reader as one."""
    assert "90 % of" in " ".join(serve.parser().format_help().split())


def test_keys_from_everywhere(monkeypatch):
    """Keys come from repeated flags or from one variable, named or not."""
    keys = from_flags("--api-key", "alice=alices-key", "--api-key", "a-second-key").keys
    assert [key.tenant for key in keys][:1] == ["alice"]
    monkeypatch.setenv("CHATSERVE_API_KEYS", "bob=bobs-key-2, carol=carols-key")
    assert [key.tenant for key in load_settings().keys] == ["bob", "carol"]


def test_key_with_padding_has_no_name():
    """The `=` at the end of a base64 key is part of the key."""
    assert parse_api_key("c2VjcmV0c2VjcmV0==").digest == hash_key("c2VjcmV0c2VjcmV0==")
    assert parse_api_key("me=c2VjcmV0c2VjcmV0==").tenant == "me"


@pytest.mark.parametrize("key", ["short", "with space in it", "tabs\tin-the-key", "ümlaut-in-the-key"])
def test_bad_key_is_not_shown(key):
    """A key that cannot be used is refused, and does not appear in the error."""
    with pytest.raises(StartupError) as caught:
        load_settings({"api_keys": (key,)})
    assert key not in str(caught.value)
    assert "NAME=KEY" in str(caught.value)


@pytest.mark.parametrize("keys", [("a=secret-one", "a=secret-two"), ("a=secret-one", "b=secret-one")])
def test_ambiguous_keys(keys):
    """Two keys of one name, or two names of one key, are refused."""
    with pytest.raises(StartupError, match="given twice"):
        load_settings({"api_keys": keys})


def test_keys_are_not_in_the_repr():
    """Printing the settings shows neither keys nor the Redis URL with its password."""
    settings = load_settings({"api_keys": ("alice=alices-key",), "redis_url": "redis://:hunter2@db/0"})
    assert "alices-key" not in repr(settings)
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "chat.example.org"])
def test_open_server_is_refused(host):
    """Beyond this machine a key is needed, or the word that none is wanted."""
    with pytest.raises(StartupError, match=r"--api-key.*--insecure"):
        load_settings({"host": host})
    assert load_settings({"host": host, "insecure": True}).host == host
    assert load_settings({"host": host, "api_keys": ("alice=alices-key",)}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]", "LOCALHOST"])
def test_loopback(host):
    """The ways to say: this machine only."""
    assert is_loopback(host)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"port": "abc"}, ["port = 'abc'", "--port", "CHATSERVE_PORT"]),
        ({"port": "70000"}, ["port = '70000'", "65535"]),
        ({"device": "tpu"}, ["device = 'tpu'", "'cpu'", "'cuda'"]),
        ({"dtype": "float8"}, ["dtype = 'float8'", "'bfloat16'", "--dtype"]),
        ({"load_format": "random"}, ["load_format = 'random'", "'dummy'", "--load-format"]),
        ({"kv_device_memory": "1k"}, ["kv_device_memory = '1k'", "--kv-device-memory"]),
        ({"max_step_tokens": "0"}, ["max_step_tokens = '0'", "--max-step-tokens"]),
        ({"allowed_origins": ("chat.example.org/x",)}, ["chat.example.org/x", "https://"]),
        ({"max_context": "1"}, ["max_context = '1'", "16"]),
    ],
)
def test_bad_values(settings, expected):
    """An error names the value, what is wrong with it and where to set it."""
    with pytest.raises(StartupError) as caught:
        load_settings(settings)
    for part in expected:
        assert part in str(caught.value)


def test_several_bad_values_at_once():
    """Every bad value is named, a line each."""
    with pytest.raises(StartupError) as caught:
        load_settings({"port": "abc", "device": "tpu"})
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(("content", "expected"), [("port = \n", "line 1"), ("prot = 1", "'prot'")])
def test_bad_file(tmp_path, content, expected):
    """A file that cannot be read, or sets what there is not, is named."""
    (tmp_path / "chatserve.toml").write_text(content)
    with pytest.raises(StartupError, match=r"chatserve\.toml") as caught:
        load_settings()
    assert expected in str(caught.value)
