"""Whatever arrives, decoding gives a command or an error that can be sent back."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatserve.errors import ServiceError
from chatserve.protocol import events
from chatserve.protocol.codec import Encoding, command_from, decode_command, encode
from tests.protocol.test_commands import VALID

CODES = {"bad_message", "unknown_type", "missing_field", "invalid_value", "message_too_large"}
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=80)
    | st.binary(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted({name for command in VALID for name in command})
NEARLY = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), VALUES, max_size=6)


def check(data: bytes | str, encoding: Encoding) -> None:
    """Decode; an error must have a known code, be short, and go through both encodings."""
    error = refusal(data, encoding)
    if error is None:
        return
    assert error.code in CODES
    assert len(error.message) < 600
    reply = events.error(error.as_object(), command_id=getattr(error, "command_id", None))
    assert encode(reply, "msgpack")
    assert encode(reply, "json")


def refusal(data: bytes | str, encoding: Encoding) -> ServiceError | None:
    """What decoding raises; None for a valid command, which then has a type."""
    try:
        command = decode_command(data, encoding)
    except ServiceError as error:
        return error
    assert command.type
    return None


@settings(max_examples=2000, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_break_the_decoder(data: bytes) -> None:
    """Bytes at random, as msgpack and as JSON text."""
    check(data, "msgpack")
    check(data.decode("utf-8", "replace"), "json")


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES | NEARLY)
def test_random_values_never_break_the_decoder(value: Any) -> None:
    """Proper msgpack and JSON of improper commands."""
    check(msgpack.packb(value), "msgpack")
    check(json.dumps(value, default=repr), "json")


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(VALID), st.sampled_from(FIELDS), VALUES)
def test_a_valid_command_with_one_wrong_field_never_breaks_the_decoder(
    command: dict[str, Any], name: str, value: Any
) -> None:
    """A valid command in which one field holds anything."""
    check(msgpack.packb({**command, name: value}), "msgpack")


def mutated(generator: random.Random) -> bytes:
    """A valid command's bytes with a few of them changed, left out, or doubled."""
    data = bytearray(msgpack.packb(generator.choice(VALID)))
    for _ in range(generator.randint(1, 4)):
        start = generator.randrange(len(data))
        stop = min(len(data), start + generator.randint(0, 4))
        data[start:stop] = generator.choice((b"", bytes(data[start:stop]) * 2, generator.randbytes(2)))
        data = data or bytearray(b"\xc0")
    return bytes(data)


def check_mutated(seed: int, count: int) -> None:
    generator = random.Random(seed)
    for _ in range(count):
        data = mutated(generator)
        check(data, "msgpack")
        check(data.decode("utf-8", "replace"), "json")


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_commands_never_break_the_decoder(seed: int) -> None:
    """Two thousand commands with a few bytes wrong."""
    check_mutated(seed, count=2000)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(100, 110))
def test_mutated_commands_never_break_the_decoder_for_long(seed: int) -> None:
    """A hundred thousand commands with a few bytes wrong, over ten seeds."""
    check_mutated(seed, count=10_000)


def test_decoding_leaves_its_input_alone() -> None:
    """A parsed map that is handed in may be used again."""
    for command in VALID:
        before = copy.deepcopy(command)
        command_from(command)
        assert command == before
