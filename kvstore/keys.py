"""What a page is called on every tier: a hash of all that its rows depend on, chained from page to page.

Two pages have the same key only where model, layout, tenant and every token up to the page's end are the same. It
knows tokens and bytes, not where pages lie.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from kvstore.arrays import TokenArray
from kvstore.layout import KVLayout

KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class NamedPage:
    """A page by what it holds; `num_bytes` is less than a page for one that ends in its path's last tokens."""

    key: bytes
    num_bytes: int


class PageKeys:
    """Keys of one model's pages. `fingerprint` names everything else that rows depend on: weights, dtype, layout."""

    def __init__(self, layout: KVLayout, fingerprint: bytes) -> None:
        self._layout = layout
        shape = f"{layout.num_layers} {layout.num_kv_heads} {layout.head_dim} {layout.dtype} {layout.page_bytes}"
        self._model = _digest(b"model", shape.encode(), fingerprint)

    @property
    def fingerprint(self) -> bytes:
        """32 bytes that name the model and the layout of its pages: what records of other ones are told apart by."""
        return self._model

    def root(self, salt: bytes) -> bytes:
        """What a tenant's first pages are chained to."""
        return _digest(b"root", self._model, salt)

    def page(self, before: bytes, tokens: TokenArray) -> bytes:
        """The key of a page behind the one with the key `before`; `tokens` are those that it alone completes."""
        return _digest(b"page", before, tokens.tobytes())

    def tail(self, before: bytes, tokens: TokenArray) -> bytes:
        """The key of a page whose rows are valid for `tokens`, which do not complete it."""
        return _digest(b"tail", before, tokens.tobytes())

    def of_path(self, salt: bytes, tokens: TokenArray) -> list[bytes]:
        """The key of each complete page of a path."""
        key, keys = self.root(salt), []
        for page in range(self._layout.complete_pages(len(tokens))):
            key = self.page(key, tokens[self.first_token(page) : self.first_token(page + 1)])
            keys.append(key)
        return keys

    def first_token(self, page: int) -> int:
        """The first token that pages before `page` do not depend on."""
        return self._layout.tokens_to_fill(page)


def _digest(kind: bytes, *parts: bytes) -> bytes:
    """Each part with its length before it, so that no two lists of parts are the same bytes."""
    digest = hashlib.blake2b(kind, digest_size=KEY_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()
