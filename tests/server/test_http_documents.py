"""Export and import: what leaves comes back the same, and what is sent by others is read with suspicion."""

import copy
import json

import pytest

from tests.server.real import SAYS_WELL

SCRIPT = "<script>alert(1)</script>"


async def conversation(http, **fields):
    """A session of two turns, the second one answered twice: a tree."""
    path = f"/v1/sessions/{(await http.post('/v1/sessions', json=fields)).json()['id']}"
    first = (await http.post(f"{path}/responses", json={"input": "Hello"})).json()
    second = (await http.post(f"{path}/responses", json={"input": "Grüße 🦊"})).json()
    again = {"parent_id": second["message_id"]}
    assert (await http.post(f"{path}/responses", json=again)).json()["response"]["status"] == "completed"
    assert first["response"]["status"] == "completed"
    return path


def content(document):
    """A document without the names and times that every session has of its own."""
    order = [message["id"] for message in document["messages"]]
    messages = copy.deepcopy(document["messages"])
    for message in messages:
        message["parent_id"] = order.index(message["parent_id"]) if message["parent_id"] else None
        del message["id"], message["created_at"]
    session = {name: value for name, value in document["session"].items() if name not in ("head_id", "created_at")}
    return session, messages, order.index(document["session"]["head_id"])


async def exported(http, path):
    return (await http.get(f"{path}/export")).json()


async def imported(http, document, status=201):
    answer = await http.post("/v1/sessions/import", json=document)
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_round_trip(real):
    """An imported export has the same tree, texts, token ids and settings, and the next turn adds to those ids."""
    fields = {"title": "One", "instructions": "Be brief.", "metadata": {"a": "b"}, "params": {"temperature": 0.5}}
    async with real() as server, server.http() as http:
        path = await conversation(http, **fields)
        document = await exported(http, path)
        assert all(message["token_ids"] for message in document["messages"])
        view = await imported(http, document)
        copied = f"/v1/sessions/{view['id']}"
        assert content(await exported(http, copied)) == content(document)
        assert view["id"] not in json.dumps(document)
        history = [i for m in document["messages"] if m["id"] in branch(document) for i in m["token_ids"]]
        await http.post(f"{copied}/responses", json={"input": "More"})
        assert list(server.engine.requests[-1].token_ids)[: len(history)] == history


def branch(document):
    """The ids on the way to the head."""
    parents = {message["id"]: message["parent_id"] for message in document["messages"]}
    ids, at = set(), document["session"]["head_id"]
    while at:
        ids.add(at)
        at = parents[at]
    return ids


def other_model(document):
    document["model"]["id"] = "another"


def other_vocabulary(document):
    document["model"]["vocab_size"] += 1


def ids_that_lie(document):
    document["messages"][0]["token_ids"] = document["messages"][1]["token_ids"]


def reply_with_more(document):
    document["messages"][1]["token_ids"] *= 2


def ids_beyond_the_vocabulary(document):
    document["messages"][0]["token_ids"][0] = 1 << 30


@pytest.mark.parametrize(
    "change", [other_model, other_vocabulary, ids_that_lie, reply_with_more, ids_beyond_the_vocabulary]
)
async def test_text_counts_where_ids_do_not(real, change):
    """Ids of another model, or ids that do not say the text beside them, are left: the turn reads the texts."""
    async with real() as server, server.http() as http:
        document = await exported(http, await conversation(http))
        change(document)
        view = await imported(http, document)
        path = f"/v1/sessions/{view['id']}"
        copied = await exported(http, path)
        assert [m["text"] for m in copied["messages"]] == [m["text"] for m in document["messages"]]
        assert not any(message["token_ids"] for message in copied["messages"])
        turn = (await http.post(f"{path}/responses", json={"input": "More"})).json()
        assert turn["response"]["status"] == "completed"
        text = server.services.completions._text.decode(server.engine.requests[-1].token_ids)
        assert text.index("Hello") < text.index("Well said.") < text.index("Grüße 🦊") < text.index("More")
        usage, state = turn["response"]["usage"], (await http.get(path)).json()
        assert state["context"]["used_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert (await http.get(f"{path}/cache")).json()["tokens"] == state["context"]["used_tokens"]


async def test_import_is_idempotent(real):
    """The same key imports once; with another document it is a conflict."""
    async with real() as server, server.http({"Idempotency-Key": "once"}) as http:
        document = (await http.get(f"/v1/sessions/{(await http.post('/v1/sessions')).json()['id']}/export")).json()
        document["session"]["title"] = "Mine"
        http.headers["Idempotency-Key"] = "import"
        first = await imported(http, document)
        assert (await imported(http, document, 200))["id"] == first["id"]
        document["session"]["title"] = "Another"
        assert (await imported(http, document, 409))["error"]["code"] == "idempotency_conflict"


def put(place, value):
    """A change that sets one place of a document, as `messages.0.role`."""

    def change(document):
        *steps, last = [int(step) if step.isdigit() else step for step in place.split(".")]
        for step in steps:
            document = document[step]
        document[last] = value

    change.__name__ = f"{place}={str(value)[:20]}"
    return change


def swap(document):
    document["messages"].reverse()


def same_ids(document):
    document["messages"][2]["id"] = document["messages"][0]["id"]


def users_in_a_row(document):
    document["messages"][2]["parent_id"] = document["messages"][0]["id"]


def loop(document):
    document["messages"][0]["parent_id"] = document["messages"][3]["id"]


@pytest.mark.parametrize(
    "change",
    [
        swap,
        same_ids,
        users_in_a_row,
        loop,
        put("format", "something"),
        put("version", 2),
        put("extra", 1),
        put("session.title", "x" * 201),
        put("session.title", 5),
        put("session.metadata", {str(i): "" for i in range(17)}),
        put("session.params", {"temperature": 9}),
        put("session.template_date", "../../etc"),
        put("session.template_date", "2024-13-01"),
        put("session.head_id", "msg_none"),
        put("session.tenant", "bob"),
        put("messages", {}),
        put("messages.0.role", "system"),
        put("messages.0.text", None),
        put("messages.0.token_ids", [-1]),
        put("messages.0.token_ids", "abc"),
        put("messages.0.created_at", -1),
        put("messages.1.state", "in_progress"),
        put("messages.1.parent_id", None),
        put("messages.1.response", {}),
    ],
    ids=lambda change: change.__name__,
)
async def test_bad_documents(real, change):
    """What no export gives is refused by name, and nothing is made of it."""
    async with real() as server, server.http() as http:
        document = await exported(http, await conversation(http))
        change(document)
        error = (await imported(http, document, 400))["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")
        assert len((await http.get("/v1/sessions")).json()["data"]) == 1


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"{", 400), (b"[]", 400), (b"\xff\xfe", 400), (b"[" * 50_000, 400), (b" " * 70_000, 413)],
)
async def test_bad_bodies(real, body, status):
    """What is no JSON, no map or too large is refused before anything is made of it."""
    async with real(max_import_bytes="64k") as server, server.http() as http:
        answer = await http.post("/v1/sessions/import", content=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


async def test_times_of_others_are_not_believed(real):
    """Times in the future do not move new messages there, and equal ones keep the order."""
    async with real() as server, server.http() as http:
        document = await exported(http, await conversation(http))
        for message in document["messages"]:
            message["created_at"] = (1 << 53) - 1
        path = f"/v1/sessions/{(await imported(http, document))['id']}"
        turn = (await http.post(f"{path}/responses", json={"input": "More"})).json()
        copied = await exported(http, path)
    assert [m["text"] for m in copied["messages"][:5]] == [m["text"] for m in document["messages"]]
    assert copied["messages"][-1]["id"] == turn["response"]["message_id"]
    assert copied["messages"][-1]["created_at"] < 1 << 43


async def test_reply_in_progress_is_left_out(real):
    """An export during a reply has what was said before, and can be imported."""
    async with real(gated=True) as server, server.http() as http:
        path = f"/v1/sessions/{(await http.post('/v1/sessions')).json()['id']}"
        async with http.stream("POST", f"{path}/responses", json={"input": "Hello", "stream": True}):
            document = await exported(http, path)
            assert [message["role"] for message in document["messages"]] == ["user"]
            assert document["session"]["head_id"] == document["messages"][0]["id"]
            await imported(http, document)
        server.engine.allow(100)


async def test_downloads_are_never_pages(real):
    """Both forms are sent as files named by the session's id, with types and headers under which no script runs."""
    async with real() as server, server.http() as http:
        path = await conversation(http, title=f"../../{SCRIPT}\r\nX-Evil: 1")
        for chosen, suffix in (("json", "json"), ("markdown", "md")):
            answer = await http.get(f"{path}/export", params={"format": chosen})
            name = path.rpartition("/")[2]
            assert answer.headers["content-disposition"] == f'attachment; filename="{name}.{suffix}"'
            assert answer.headers["content-type"].split(";")[0] in ("application/json", "text/markdown")
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "sandbox" in answer.headers["content-security-policy"]
            assert "x-evil" not in answer.headers


async def test_markdown(real):
    """The present branch, each message under its speaker; a title is a title only, an open code block ends."""
    async with real(choose=SAYS_WELL) as server, server.http() as http:
        path = f"/v1/sessions/{(await http.post('/v1/sessions', json={'title': f'{SCRIPT}#[x](y)'})).json()['id']}"
        await http.post(f"{path}/responses", json={"input": "```python\nprint(1)"})
        text = (await http.get(f"{path}/export", params={"format": "markdown"})).text
    title, origin, *rest = text.split("\n\n")
    assert title == r"# \<script\>alert\(1\)\</script\>\#\[x\]\(y\)"
    assert origin.endswith("model fake")
    assert rest == ["## User", "```python\nprint(1)\n```", "## Assistant", "Well said.\n"]


@pytest.mark.parametrize("query", ["format=html", "format=", "as=json"])
async def test_unknown_format(real, query):
    """A form that there is not is refused by name."""
    async with real() as server, server.http() as http:
        answer = await http.get(f"/v1/sessions/sess_none/export?{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
