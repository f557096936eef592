"""Bodies of OpenAI's API as nobody meant them: each is taken or refused, and nothing else happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatserve.errors import BadRequest
from chatserve.server.openai import chat_body, completion_body, response_body

TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["user", "assistant", "system", "text", "message", "input_text"])
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS)
NAMES = st.one_of(TEXTS, st.sampled_from(["role", "content", "type", "text", "id", "tool_calls", "annotations"]))
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4))
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": VALUES},
        optional={"name": VALUES, "type": VALUES, "id": VALUES},
    ),
    max_size=4,
)
READERS: dict[str, tuple[Any, set[str], Callable[[dict[str, Any]], Any]]] = {
    "completion": (
        completion_body.CompletionBody,
        set(completion_body.UNSUPPORTED),
        lambda body: completion_body.read_body(body, model="m", vocab_size=9),
    ),
    "chat": (chat_body.ChatBody, set(chat_body.UNSUPPORTED), lambda body: chat_body.read_chat(body, model="m")),
    "response": (
        response_body.ResponseBody,
        set(response_body.UNSUPPORTED),
        lambda body: response_body.read_response(body, model="m"),
    ),
}


def bodies(names: set[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies of known and unknown fields with any values."""
    known = st.dictionaries(st.sampled_from(sorted(names)), VALUES | MESSAGES, max_size=5)
    return st.builds(lambda some, others: {**others, **some}, known, st.dictionaries(TEXTS, VALUES, max_size=1))


@pytest.mark.parametrize("kind", list(READERS))
def test_any_body_is_taken_or_refused(kind):
    """A refusal has a code, a sentence and, but for a body that lacks everything, the field's name."""
    model, unsupported, read = READERS[kind]

    @settings(max_examples=40, deadline=None)
    @given(bodies({*model.model_fields, *unsupported}))
    def check(body: dict[str, Any]) -> None:
        try:
            read(body)
        except BadRequest as error:
            refusal = error
        else:
            return
        assert refusal.message
        assert refusal.param is not None
        assert refusal.code in ("invalid_value", "missing_field", "not_supported", "model_not_found")

    check()
