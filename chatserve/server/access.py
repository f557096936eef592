"""Who may talk to this server: API keys to tenants, and the web origins and host names that are taken.

Pure decisions on strings; it knows no sockets and no framework.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from chatserve.api_keys import ApiKey, hash_key
from chatserve.errors import Forbidden, Unauthorized
from chatserve.settings import LOCAL_TENANT, is_loopback


class Access:
    """The rules of one server. Without keys everybody is the tenant `local` and a presented key is ignored."""

    def __init__(self, *, keys: Iterable[ApiKey], allowed_origins: Iterable[str], bound_host: str) -> None:
        self._digests = [(key.digest, key.tenant) for key in keys]
        self._allowed_origins = frozenset(allowed_origins)
        self._allowed_hosts = frozenset(_host_of(origin) for origin in self._allowed_origins)
        self._bound_host = bound_host.strip("[]").lower()
        self._is_local = is_loopback(bound_host)

    def tenant(self, key: str | None) -> str:
        """The tenant that `key` opens; raises Unauthorized, with the same words for a wrong key and for none."""
        if not self._digests:
            return LOCAL_TENANT
        presented = hash_key(key or "")
        found = None
        for digest, tenant in self._digests:  # every key is compared, so the time taken says nothing about them
            if hmac.compare_digest(digest, presented):
                found = tenant
        if found is None:
            raise Unauthorized("a valid API key is required: send 'Authorization: Bearer KEY', or 'token' in hello")
        return found

    def check_browser(self, *, host: str | None, origin: str | None) -> None:
        """Refuse a request that a foreign web page made; raises Forbidden.

        `Host` is checked where no key protects, or none need: a page whose name was rebound to this server's address
        carries its own name there. On loopback that is any other name, elsewhere any with a dot that is no address.
        """
        if (self._is_local or not self._digests) and not self._is_own_host(host):
            raise Forbidden(
                f"host {host!r} is not this server's; use its address, or allow the origin with --allowed-origin"
            )
        if origin is not None and not self._is_allowed_origin(origin, host):
            raise Forbidden(f"origin {origin!r} may not connect; allow it with --allowed-origin")

    def _is_own_host(self, host: str | None) -> bool:
        name = _host_of(f"//{host or ''}")
        if name == self._bound_host or is_loopback(name) or name in self._allowed_hosts:
            return True
        return not self._is_local and (_is_address(name) or (bool(name) and "." not in name))

    def _is_allowed_origin(self, origin: str, host: str | None) -> bool:
        # Only host and port are compared with our own: behind a proxy that ends TLS the scheme differs.
        return origin.lower() in self._allowed_origins or (bool(host) and _netloc(origin) == str(host).lower())


def bearer_key(authorization: str | None) -> str | None:
    """The key of an `Authorization: Bearer KEY` header."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # such as an unclosed bracket
        return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
