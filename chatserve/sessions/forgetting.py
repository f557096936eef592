"""What the engine must forget of a session that is deleted: all that no other session of the tenant begins with.

Sessions share their instructions and, where one was forked off another, its messages. Only the latest ones with the
same instructions are looked at; whatever others share is computed again when they need it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import numpy as np
import numpy.typing as npt

from chatserve.engine.api import Forgotten
from chatserve.sessions.limits import SessionLimits
from chatserve.sessions.ports import Store
from chatserve.sessions.session import LiveSession
from chatserve.sessions.tree import Messages, path_to

TokenArray = npt.NDArray[np.int32]


async def histories_to_forget(live: LiveSession, store: Store, limits: SessionLimits) -> list[Forgotten]:
    """Every branch of the session, with how much of it others have too. Raises StorageUnavailable."""
    branches = [branch for branch in _branches(live.messages) if len(branch)]
    if not branches:
        return []
    kept = [0] * len(branches)
    for session_id in await _alike(live, store, limits.max_compared_sessions):
        others = _branches(await store.load_messages(session_id))
        kept = [max(num, _shared(branch, others)) for num, branch in zip(kept, branches, strict=True)]
    return [Forgotten(branch.tolist(), num) for branch, num in zip(branches, kept, strict=True)]


async def _alike(live: LiveSession, store: Store, limit: int) -> list[str]:
    """The tenant's latest sessions that may begin as this one does."""
    listed = await store.list_sessions(live.meta.tenant, limit)
    same = [meta for meta in listed if meta.instructions == live.meta.instructions and meta.num_messages]
    return [meta.id for meta in same if meta.id != live.id]


def _branches(messages: Messages) -> list[TokenArray]:
    """The token ids from the first message to each last one."""
    parents = {message.parent_id for message in messages.values()}
    paths = (path_to(messages, message) for message in messages.values() if message.id not in parents)
    return [np.array(list(chain.from_iterable(message.token_ids for message in path)), np.int32) for path in paths]


def _shared(branch: TokenArray, others: Iterable[TokenArray]) -> int:
    return max((_common_prefix(branch, other) for other in others), default=0)


def _common_prefix(left: TokenArray, right: TokenArray) -> int:
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if len(different) else length
