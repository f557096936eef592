"""Keys, origins and hosts as pure decisions."""

import pytest

from chatserve.api_keys import parse_api_key
from chatserve.errors import Forbidden, Unauthorized
from chatserve.server.access import Access, bearer_key

KEYS = [parse_api_key("alice=alices-key"), parse_api_key("just-a-key")]


def access(*, keys=(), origins=(), host="127.0.0.1"):
    return Access(keys=keys, allowed_origins=origins, bound_host=host)


def test_tenant_without_keys():
    """With no key set everyone is the local tenant, and a presented key is ignored."""
    assert access().tenant(None) == access().tenant("whatever") == "local"


def test_tenant_of_key():
    """A named key opens its name's sessions; one without a name those of its hash, which is not the key."""
    assert access(keys=KEYS).tenant("alices-key") == "alice"
    unnamed = access(keys=KEYS).tenant("just-a-key")
    assert unnamed.startswith("key-")
    assert "just" not in unnamed


@pytest.mark.parametrize("key", [None, "", "alice", "alice=alices-key", "alices-key ", "just-a-keyx"])
def test_tenant_refuses(key):
    """Anything but a key, exactly, is refused."""
    with pytest.raises(Unauthorized):
        access(keys=KEYS).tenant(key)


@pytest.mark.parametrize(
    ("header", "key"),
    [("Bearer abc", "abc"), ("bearer  abc ", "abc"), ("Basic abc", None), ("Bearer", None), ("", None), (None, None)],
)
def test_bearer_key(header, key):
    """Only the Bearer scheme carries a key."""
    assert bearer_key(header) == key


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8000", None),
        ("localhost:8000", "http://localhost:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("127.0.0.1:8000", "https://chat.example.org"),
        ("chat.example.org", "https://chat.example.org"),
        ("127.0.0.1:8000", "HTTPS://Chat.Example.org"),
    ],
)
def test_browser_allowed(host, origin):
    """Own pages, allowed pages and programs without an origin pass."""
    access(origins=["https://chat.example.org"]).check_browser(host=host, origin=origin)


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("evil.example:8000", None),
        (None, None),
        ("[", None),
        ("127.0.0.1:8000", "http://127.0.0.1:9000"),
        ("127.0.0.1:8000", "http://evil.example"),
        ("127.0.0.1:8000", "null"),
        ("127.0.0.1:8000", ""),
        ("127.0.0.1:8000", "http://["),
    ],
)
def test_browser_refused_on_loopback(host, origin):
    """A rebound name in Host, another port or site in Origin, and an opaque origin are refused."""
    with pytest.raises(Forbidden):
        access().check_browser(host=host, origin=origin)


def test_host_is_not_checked_where_keys_protect():
    """A public server cannot know all its names; the origin must still be its own."""
    public = access(host="0.0.0.0", keys=KEYS)
    public.check_browser(host="chat.example.org", origin="https://chat.example.org")
    with pytest.raises(Forbidden):
        public.check_browser(host="chat.example.org", origin="https://evil.example")


def test_without_keys_no_name_of_the_web_is_taken():
    """Beyond loopback too: addresses, names without a dot and allowed ones pass, one that may be rebound does not."""
    insecure = access(host="0.0.0.0", origins=["https://chat.example.org"])
    for host in ("192.168.1.7:8000", "[fd00::1]:8000", "chatserve:8000", "localhost", "chat.example.org"):
        insecure.check_browser(host=host, origin=None)
    for host in ("evil.example:8000", "", None):
        with pytest.raises(Forbidden, match="--allowed-origin"):
            insecure.check_browser(host=host, origin=None)
