"""Documents of others: whatever stands in one, it is refused by name or becomes a session that holds together."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from chatserve.engine.api import EngineInfo
from chatserve.errors import BadRequest
from chatserve.sessions.portable import imported_session, read_document
from chatserve.sessions.tree import path_to

INFO = EngineInfo("m", 4096, 300, 4096, 65536, 64, "cpu", "float32", "none")
NOW_MS = 1_800_000_000_000
DOCUMENT = {
    "format": "chatserve.session",
    "version": 1,
    "exported_at": 5,
    "model": {"id": "m", "vocab_size": 300},
    "session": {"title": "t", "instructions": "", "metadata": {"a": "b"}, "params": {"stop": ["x"]}, "head_id": "d"},
    "messages": [
        {"id": "a", "parent_id": None, "role": "user", "text": "ab", "token_ids": [97, 98], "created_at": 1},
        {"id": "b", "parent_id": "a", "role": "assistant", "text": "c", "token_ids": [99], "model": "m"},
        {"id": "c", "parent_id": "a", "role": "assistant", "text": "", "token_ids": [], "state": "failed"},
        {"id": "d", "parent_id": "b", "role": "user", "text": "d", "token_ids": [100], "created_at": 3},
    ],
}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["a", "b", "d", "assistant", "user", "incomplete", "in_progress", "m", "2024-02-30", [], {}, [97]]),
)


def decode(token_ids):
    return bytes(token_id % 256 for token_id in token_ids).decode("latin-1")


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The way to every value in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for step, part in inner for place in places(part, (*path, step)))]


@st.composite
def documents(draw):
    """The document with up to three of its values replaced, taken away or doubled."""
    document = copy.deepcopy(DOCUMENT)
    for _ in range(draw(st.integers(0, 3))):
        *way, last = draw(st.sampled_from([place for place in places(document) if place]))
        holder = document
        for step in way:
            holder = holder[step]
        change = draw(st.sampled_from(["set", "remove", "double"]))
        if change == "remove":
            del holder[last]
        elif change == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        else:
            holder[last] = draw(VALUES)
    return document


@given(documents())
@settings(max_examples=200, deadline=None)
def test_any_document(document):
    """Nothing but BadRequest comes of a bad one; of a good one a tree of new names, in order, of the right tenant."""
    raw = json.dumps(document).encode()
    try:
        read = read_document(raw)
    except BadRequest as refusal:
        assert len(refusal.message) < 600  # noqa: PT017 - most examples are refused, and all of them are looked at
        return
    meta, messages = imported_session("t", read, INFO, decode, NOW_MS)
    by_id = {message.id: message for message in messages}
    assert (meta.tenant, meta.active, meta.num_messages, len(by_id)) == ("t", None, len(messages), len(messages))
    assert not by_id.keys() & {message["id"] for message in document["messages"]}
    assert meta.head_id is None or path_to(by_id, by_id[meta.head_id])
    assert [m.created_at for m in messages] == sorted({m.created_at for m in messages})
    assert max((m.created_at for m in messages), default=0) < NOW_MS + len(messages)
    assert all(token_id < INFO.vocab_size for m in messages for token_id in m.token_ids)
    assert all((message.response is None) == (message.role == "user") for message in messages)


def test_the_document_itself_is_good():
    """Unchanged it keeps its ids, so that the random test is about something."""
    meta, messages = imported_session("t", read_document(json.dumps(DOCUMENT).encode()), INFO, decode, NOW_MS)
    assert [message.token_ids for message in messages] == [[97, 98], [99], [], [100]]
    assert (meta.title, meta.params, meta.head_id) == ("t", {"stop": ["x"]}, messages[3].id)
