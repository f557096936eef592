"""What each command accepts, and how a refusal reads."""

from __future__ import annotations

import json
from typing import Any

import msgpack
import pytest

from chatserve.errors import BadRequest, MessageTooLarge
from chatserve.protocol import commands
from chatserve.protocol.codec import Encoding, command_from, decode_command

VALID: list[dict[str, Any]] = [
    {
        "type": "hello",
        "client": {"name": "page", "version": "1"},
        "token": "secret",
        "resume": [{"session_id": "s1", "epoch": 1, "after_seq": 7}],
    },
    {
        "type": "session.create",
        "id": "c1",
        "key": "k1",
        "title": "Greetings",
        "instructions": "Be brief.",
        "metadata": {"colour": "blue"},
        "params": {"temperature": 0.5, "stop": ["\n"]},
    },
    {"type": "session.attach", "id": "c2", "session_id": "s1", "epoch": 1, "after_seq": 0},
    {"type": "session.detach", "id": "c3", "session_id": "s1"},
    {
        "type": "session.update",
        "id": "c4",
        "session_id": "s1",
        "title": "",
        "metadata": {},
        "params": {"seed": 1},
        "head_id": "m1",
        "archived": True,
        "pinned": False,
    },
    {"type": "session.delete", "id": "c5", "session_id": "s1"},
    {"type": "session.fork", "id": "c6", "session_id": "s1", "at_message_id": "m1", "key": "k2", "title": "Other"},
    {
        "type": "response.create",
        "id": "c7",
        "session_id": "s1",
        "key": "k3",
        "parent_id": "m1",
        "input": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}],
        "max_output_tokens": 16,
        "temperature": 1,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": 7,
        "stop": ["a", "b"],
        "ignore_eos": True,
    },
    {
        "type": "response.create",
        "id": "c8",
        "session_id": "s1",
        "key": "k4",
        "input": [{"type": "token_ids", "token_ids": [1, 2, 3]}],
    },
    {"type": "response.cancel", "id": "c9", "session_id": "s1", "response_id": "r1"},
    {"type": "session.typing", "session_id": "s1"},
    {"type": "ping", "t": 1732170000000.5},
]
RESPONSE = {"type": "response.create", "id": "c1", "session_id": "s1", "key": "k1"}
SESSION = {"type": "session.create", "id": "c1", "key": "k1"}
PING = {"type": "ping", "t": 1}


def encoded(command: Any, encoding: Encoding) -> bytes | str:
    return msgpack.packb(command) if encoding == "msgpack" else json.dumps(command)


def refusal(command: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        command_from(command)
    return caught.value


@pytest.mark.parametrize("encoding", ["msgpack", "json"])
@pytest.mark.parametrize("command", VALID, ids=lambda command: command["type"])
def test_every_command_is_decoded_in_both_encodings(command: dict[str, Any], encoding: Encoding) -> None:
    """Each command of the protocol with all of its fields becomes its dataclass, with the values that were sent."""
    decoded = decode_command(encoded(command, encoding), encoding)
    assert decoded.type == command["type"]
    assert decoded.id == command.get("id")
    assert decoded == command_from(command)


def test_the_samples_cover_every_command_and_field() -> None:
    """No command and no field of a command is left out of the samples above."""
    sampled: dict[type, set[str]] = {}
    for command in VALID:
        sampled.setdefault(type(command_from(command)), set()).update(command)
    for cls, names in sampled.items():
        optional_id = {"id"} if cls in (commands.Hello, commands.SessionTyping, commands.Ping) else set()
        assert names | optional_id == set(cls.__dataclass_fields__)
    assert len(sampled) == 11


def test_a_text_input_arrives_as_one_part_and_a_stop_string_as_one_of_a_tuple() -> None:
    """The short forms are the long forms to whoever reads the command."""
    command = command_from({**RESPONSE, "input": "Hello", "stop": "\n"})
    assert isinstance(command, commands.ResponseCreate)
    assert command.input == (commands.TextPart(text="Hello"),)
    assert command.stop == ("\n",)


def test_given_params_are_those_that_were_sent() -> None:
    """Of a response's settings only those given are stored, a zero included, as plain values."""
    command = command_from({**RESPONSE, "temperature": 0, "stop": "x", "top_p": None})
    assert isinstance(command, commands.ResponseCreate)
    assert commands.given_params(command) == {"temperature": 0.0, "stop": ["x"]}


def test_null_is_the_same_as_absent() -> None:
    """A client that writes null for what it leaves out is understood."""
    assert command_from({**SESSION, "title": None}) == command_from(SESSION)


@pytest.mark.parametrize(
    ("command", "param"),
    [
        ({"id": "c1"}, "type"),
        ({"type": "session.create", "id": "c1"}, "key"),
        ({"type": "hello", "client": {"name": "page"}}, "client.version"),
        ({"type": "ping"}, "t"),
        ({**RESPONSE, "input": [{"type": "text"}]}, "input.0.text"),
        ({**RESPONSE, "input": [{"text": "Hello"}]}, "input.0.type"),
        ({"type": "hello", "client": {"name": "", "version": ""}, "resume": [{"epoch": 1}]}, "resume.0.session_id"),
    ],
)
def test_a_missing_field_is_named(command: dict[str, Any], param: str) -> None:
    """What must be there and is not is named by its path, with the command's id."""
    error = refusal(command)
    assert (error.code, error.param) == ("missing_field", param)
    assert error.command_id == command.get("id")


@pytest.mark.parametrize(
    ("command", "param", "shown"),
    [
        ({**RESPONSE, "foo": 1}, "foo", "foo"),
        ({**SESSION, "params": {"temprature": 1}}, "params.temprature", "temprature"),
        ({**SESSION, "title": "x" * 201}, "title", "200"),
        ({**SESSION, "key": ""}, "key", "''"),
        ({**SESSION, "key": "k" * 65}, "key", "64"),
        ({**SESSION, "metadata": {"a": 1}}, "metadata.a", "1"),
        ({**SESSION, "metadata": {str(n): "" for n in range(17)}}, "metadata", "16"),
        ({**RESPONSE, "temperature": "1"}, "temperature", "'1'"),
        ({**RESPONSE, "temperature": 2.5}, "temperature", "2.5"),
        ({**RESPONSE, "temperature": float("nan")}, "temperature", "nan"),
        ({**RESPONSE, "temperature": float("inf")}, "temperature", "inf"),
        ({**RESPONSE, "top_p": 0}, "top_p", "0"),
        ({**RESPONSE, "top_k": -1}, "top_k", "-1"),
        ({**RESPONSE, "top_k": 1.5}, "top_k", "1.5"),
        ({**RESPONSE, "top_k": True}, "top_k", "True"),
        ({**RESPONSE, "max_output_tokens": 0}, "max_output_tokens", "0"),
        ({**RESPONSE, "ignore_eos": 1}, "ignore_eos", "1"),
        ({**RESPONSE, "seed": 1 << 63}, "seed", str(1 << 63)),
        ({**RESPONSE, "stop": []}, "stop", "[]"),
        ({**RESPONSE, "stop": ["a"] * 9}, "stop", "8"),
        ({**RESPONSE, "stop": ["a", ""]}, "stop.1", "''"),
        ({**RESPONSE, "input": ""}, "input", "''"),
        ({**RESPONSE, "input": []}, "input", "[]"),
        ({**RESPONSE, "input": 5}, "input", "list"),
        ({**RESPONSE, "input": [{"type": "image"}]}, "input.0.type", "image"),
        ({**RESPONSE, "input": [{"type": "token_ids", "token_ids": [1, -1]}]}, "input.0.token_ids.1", "-1"),
        ({**RESPONSE, "input": [{"type": "token_ids", "token_ids": []}]}, "input.0.token_ids", "[]"),
        ({**PING, "t": 10**400}, "t", "very large"),
        ({**PING, "t": "now"}, "t", "'now'"),
        ({"type": "session.typing", "session_id": b"s1"}, "session_id", "b's1'"),
    ],
)
def test_a_bad_value_is_named_and_shown(command: dict[str, Any], param: str, shown: str) -> None:
    """A wrong type, an unknown field, or a value out of bounds is refused by name, with the value or the bound."""
    error = refusal(command)
    assert (error.code, error.param) == ("invalid_value", param)
    assert shown in error.message


def test_token_ids_stand_alone() -> None:
    """Token ids are the whole message; text beside them is refused with that reason."""
    parts = [{"type": "token_ids", "token_ids": [1]}, {"type": "text", "text": "a"}]
    error = refusal({**RESPONSE, "input": parts})
    assert error.param == "input"
    assert "only part" in error.message


def test_a_connection_resumes_at_most_32_sessions() -> None:
    """`hello` is held to the limit of sessions a connection, which `welcome` announces."""
    entry = {"session_id": "s", "epoch": 1, "after_seq": 0}
    hello = {"type": "hello", "client": {"name": "page", "version": "1"}}
    assert command_from({**hello, "resume": [entry] * 32})
    assert refusal({**hello, "resume": [entry] * 33}).param == "resume"


def test_a_large_value_is_shown_shortened() -> None:
    """An error stays short however large the value is that it is about."""
    for value in ("x" * 500_000, ["x" * 1000] * 1000, {str(n): n for n in range(10_000)}, [[[[["deep"]]]]]):
        error = refusal({**SESSION, "title": value})
        assert error.param == "title"
        assert len(error.message) < 400


@pytest.mark.parametrize("name", ["session.explode", "", 5, None, ["ping"], b"ping"])
def test_an_unknown_command_is_refused_with_those_there_are(name: object) -> None:
    """A command of another name, or whose name is no text, is answered with the list of commands."""
    error = refusal({"type": name, "id": "c1"})
    assert (error.code, error.command_id) == ("unknown_type", "c1")
    assert "response.create" in error.message


@pytest.mark.parametrize("command_id", ["x" * 65, "", 5, b"c1", None, "\ud800"])
def test_an_unreadable_id_is_not_given_back(command_id: object) -> None:
    """Only an id that is a proper one is echoed."""
    assert refusal({"type": "session.delete", "id": command_id}).command_id is None


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (b"{}", "json"),
        ("{}", "msgpack"),
        ("", "json"),
        (b"", "msgpack"),
        ("{", "json"),
        (b"\x81", "msgpack"),
        ("[]", "json"),
        (b"\x90", "msgpack"),
        ("null", "json"),
        ('{"type":"ping","t":NaN}', "json"),
        ('{"type":"ping","t":1} x', "json"),
        (msgpack.packb(PING) + b"\x00", "msgpack"),
        (msgpack.packb({1: 2}), "msgpack"),
        (msgpack.packb({"type": msgpack.Timestamp(1)}), "msgpack"),
        (msgpack.packb({"type": msgpack.ExtType(5, b"x")}), "msgpack"),
        (b"\xa2\xff\xfe", "msgpack"),
        ('{"id":"\\ud800"}', "json"),
        ("[" * 100_000, "json"),
        (b"\x91" * 100_000, "msgpack"),
        (b"\xdd\xff\xff\xff\xff", "msgpack"),
        (b"\xdf\xff\xff\xff\xff", "msgpack"),
        (b"\xdd\x00\x0f\xff\xff" * 200_000, "msgpack"),
        ('{"type":"ping","t":' + "9" * 10_000 + "}", "json"),
    ],
)
def test_what_is_no_command_is_a_bad_message(data: bytes | str, encoding: Encoding) -> None:
    """Broken, foreign, nested without end or claiming elements that are not there: each is a bad message."""
    with pytest.raises(BadRequest) as caught:
        decode_command(data, encoding)
    assert caught.value.code == "bad_message"
    assert len(caught.value.message) < 300


def test_a_message_beyond_the_limit_is_refused_before_it_is_read() -> None:
    """The size is checked first, whatever the bytes are."""
    with pytest.raises(MessageTooLarge, match="11 bytes; at most 10"):
        decode_command(b"\xff" * 11, "msgpack", max_bytes=10)
    with pytest.raises(MessageTooLarge, match="12 bytes; at most 10"):
        decode_command("é" * 6, "json", max_bytes=10)
