"""Checks that span parts: reference counts against holders, mapped pages against the index, the write frontier.

Each raises IntegrityError with what is wrong; none changes anything.
"""

from __future__ import annotations

import numpy as np

from kvstore.arrays import as_page_array
from kvstore.errors import ensure
from kvstore.pool import PagePool, PageState
from kvstore.residency import Residency
from kvstore.session import Session


def check_holders(residency: Residency) -> None:
    """Every page is held by just those who should hold it, and every session maps what the index says it maps."""
    pool = residency.pool
    indexed = as_page_array(list(residency.index.pages()))
    ensure(pool.count(indexed, PageState.INDEXED) == len(indexed), "a page is in the index but not marked so")
    ensure(len(indexed) == pool.counts.indexed, "a page is marked indexed but not in the index")
    leased = [session.tensor.pages.view for session in residency.sessions.values() if session.lease is not None]
    moving = residency.tiers.held_pages() if residency.tiers else []
    pool.check_holders(np.concatenate([indexed, *leased, *moving]))
    for session in residency.sessions.values():
        _check_session(session, residency)


def check_frontier(session: Session, pool: PagePool) -> None:
    """No page with rows still to be written is anyone else's, and no indexed row will be written again."""
    num_tokens, tensor = session.tensor.num_tokens, session.tensor
    writable = tensor.pages.view[tensor.complete_pages :]
    node = session.resident.tail_node
    if node is not None and node.tail is not None and len(writable):
        ensure(int(writable[0]) == node.tail.page and node.end <= num_tokens, "a lease may write into its tail's rows")
        writable = writable[1:]
    ensure(
        pool.count(writable, PageState.PRIVATE) == len(writable), "a lease may write into a page that is not its own"
    )


def _check_session(session: Session, residency: Residency) -> None:
    resident, pages = session.resident, session.tensor.pages.view
    path = residency.index.path_pages(resident)
    ensure(np.array_equal(pages[: resident.num_pages], path), f"{session.session_id!r} maps other pages than indexed")
    tail = resident.tail_node.tail if resident.tail_node else None
    ensure(tail is None or tail.owner is resident, f"{session.session_id!r} takes another's tail for its own")
    ensure(tail is not None or resident.tail_node is None, f"{session.session_id!r} owns a tail that is gone")
    if session.lease is None:
        _check_idle(session)
        return
    check_frontier(session, residency.pool)
    ensure(len(session.lease.tokens) == session.tensor.num_tokens, "a lease's tokens are not its rows")


def _check_idle(session: Session) -> None:
    node, tensor = session.resident.tail_node, session.tensor
    behind = tensor.pages.view[session.resident.num_pages :].tolist()
    ensure(behind == ([node.tail.page] if node and node.tail else []), "an idle session maps a page too many")
    usable = node.end if node else tensor.capacity_tokens
    ensure(tensor.num_tokens == usable, f"idle {session.session_id!r} counts rows that it does not have")
