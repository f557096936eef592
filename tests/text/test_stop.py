"""Stop strings end a text at the right place, however it is cut into pieces, and nothing of them is ever shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserve.text.stop import StopFilter

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)
PIECES = st.lists(st.text("abc", max_size=3), max_size=12)


def kept_by_definition(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, looked for at every end in turn."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - len(max(complete, key=len))], True
    return text, False


def shown(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    """What a filter shows after each piece; the last entry includes what was held at the end."""
    stop_filter = StopFilter(stops)
    states = [""]
    for piece in pieces:
        states.append(states[-1] + stop_filter.push(piece))
        if stop_filter.stopped:
            return states, True
    return [*states, states[-1] + stop_filter.release()], False


@given(PIECES, STOPS)
def test_the_text_ends_at_the_first_complete_stop_string(pieces: list[str], stops: list[str]) -> None:
    """The text shown is the one a search over the whole text gives."""
    states, stopped = shown(pieces, stops)
    assert (states[-1], stopped) == kept_by_definition("".join(pieces), stops)


@given(PIECES, STOPS)
def test_the_cutting_into_pieces_does_not_matter(pieces: list[str], stops: list[str]) -> None:
    """Character by character, in pieces or at once: the same text is shown."""
    text = "".join(pieces)
    assert shown(list(text), stops)[0][-1] == shown([text], stops)[0][-1]


@given(PIECES, STOPS)
def test_nothing_shown_is_taken_back(pieces: list[str], stops: list[str]) -> None:
    """Each state of the shown text begins the final one."""
    states, _ = shown(pieces, stops)
    assert all(states[-1].startswith(state) for state in states)


def test_a_beginning_of_a_stop_string_is_held_back() -> None:
    """Text that may begin a stop string waits until it is decided."""
    stop_filter = StopFilter(["###"])
    assert stop_filter.push("one #") == "one "
    assert stop_filter.held == "#"
    assert stop_filter.push("# two") == "## two"
    assert stop_filter.push("###") == ""
    assert stop_filter.stopped


def test_text_behind_a_stop_string_is_an_error() -> None:
    """A caller that goes on behind the end is told."""
    stop_filter = StopFilter(["x"])
    stop_filter.push("x")
    with pytest.raises(ValueError, match="behind a stop string"):
        stop_filter.push("more")
