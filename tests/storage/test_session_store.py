"""What the session store writes, reads and refuses, on a real Redis."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis

from chatserve.errors import BadRequest, Conflict, NotFound
from chatserve.storage import session_store
from chatserve.storage.scripts import KEY_LIFETIME_S
from chatserve.storage.session_store import (
    FenceLost,
    IdempotencyConflict,
    IdempotencyKey,
    LogEntry,
    MessageRecord,
    SessionMeta,
    SessionStore,
    StoredKey,
)
from tests.storage.fakes import log_entries, log_entry, message_record, session_meta

KEY = IdempotencyKey("s1", "k1", "hash", {"response_id": "r1"})


async def test_a_session_is_read_as_it_was_created(store: SessionStore) -> None:
    """Every field of a session survives, and the store has set the fence and the head."""
    meta = SessionMeta(
        id="s1",
        tenant="acme",
        title="Grüße",
        instructions="Be brief.\n",
        metadata={"a": ""},
        params={"temperature": 0.5, "stop": ["\n"]},
        archived=True,
        pinned=True,
        created_at=1732170000000,
        updated_at=1732170000001,
        head_id="m1",
        template_date="2024-11-21",
        num_messages=3,
        active={"id": "r1", "seed": 2**63 - 1},
    )
    assert await store.create(meta, log_entries("s1", 1, 2)) is None
    assert await store.load_meta("s1") == replace(meta, fence="one", head_seq=2)
    assert await store.active_sessions() == ["s1"]


async def test_what_is_not_there_reads_as_nothing(store: SessionStore) -> None:
    """An unknown session is None or empty, and taking its fence says so."""
    assert await store.load_meta("s9") is None
    assert await store.load_messages("s9") == {}
    assert await store.read_log("s9", 0, 10) == []
    assert await store.first_seq("s9") is None
    assert await store.find_key("s9", "k") is None
    assert await store.list_sessions("nobody") == []
    with pytest.raises(NotFound, match="s9"):
        await store.take_fence("s9")


async def test_an_append_writes_log_messages_and_fields_together(store: SessionStore) -> None:
    """Events, whole messages, changed and removed fields arrive in one step."""
    await store.create(replace(session_meta("s1"), active={"id": "r1"}, head_id="m0"), log_entries("s1", 1, 1))
    assistant = MessageRecord(
        "m2", "m1", "assistant", "né", [5, 2**31 - 1], "complete", 9, pending_text="é", response={"status": "completed"}
    )
    entries = [log_entry("s1", 2, "a", (5,)), log_entry("s1", 3, "b", (6, 7))]
    await store.append(
        "s1",
        entries,
        expected_head=1,
        messages=[assistant, message_record("m1")],
        meta={"head_id": "m2", "updated_at": 7, "active": None, "num_messages": 2, "params": {"top_k": 1}},
    )
    meta = await store.load_meta("s1")
    assert meta is not None
    assert (meta.head_seq, meta.head_id, meta.updated_at, meta.active) == (3, "m2", 7, None)
    assert (meta.num_messages, meta.params) == (2, {"top_k": 1})
    assert await store.read_log("s1", 1, 10) == entries
    messages = await store.load_messages("s1")
    assert list(messages.values()) == [message_record("m1"), assistant]
    assert await store.active_sessions() == []


async def test_fields_that_are_the_stores_own_cannot_be_changed(store: SessionStore) -> None:
    """An append that would change fence, head, tenant or a field that does not exist is a programming error."""
    await store.create(session_meta("s1"), [])
    for name in ("fence", "head_seq", "tenant", "epoch", "colour"):
        with pytest.raises(ValueError, match=name):
            await store.append("s1", [], expected_head=0, meta={name: "x"})


async def test_a_log_has_no_gaps(store: SessionStore) -> None:
    """Events that do not follow the expected head are refused before anything is sent."""
    with pytest.raises(ValueError, match="event 2 stands where 1 is expected"):
        await store.create(session_meta("s1"), log_entries("s1", 2, 1))
    await store.create(session_meta("s1"), log_entries("s1", 1, 1))
    with pytest.raises(ValueError, match="event 3 stands where 2 is expected"):
        await store.append("s1", log_entries("s1", 3, 1), expected_head=1)


async def test_an_append_at_another_head_changes_nothing(store: SessionStore) -> None:
    """Two writers that both believe to be at the head: the second learns that it is not, and left no trace."""
    await store.create(session_meta("s1"), log_entries("s1", 1, 1))
    await store.append("s1", [log_entry("s1", 2, "first")], expected_head=1)
    with pytest.raises(FenceLost, match="event 2"):
        await store.append("s1", [log_entry("s1", 2, "second")], expected_head=1, messages=[message_record("m1")])
    with pytest.raises(FenceLost):
        await store.append("s1", log_entries("s1", 9, 1), expected_head=8)
    assert await store.read_log("s1", 1, 10) == [log_entry("s1", 2, "first")]
    assert await store.load_messages("s1") == {}


async def test_an_append_that_is_sent_again_is_done(store: SessionStore) -> None:
    """An append whose outcome was unknown may be repeated: once there, it is not written twice, later events or not."""
    await store.create(session_meta("s1"), log_entries("s1", 1, 1))
    for _ in range(3):
        assert await store.append("s1", log_entries("s1", 2, 2), expected_head=1, key=KEY) is None
    await store.append("s1", log_entries("s1", 4, 1), expected_head=3)
    assert await store.append("s1", log_entries("s1", 2, 2), expected_head=1, key=KEY) is None
    assert [entry.seq for entry in await store.read_log("s1", 0, 10)] == [1, 2, 3, 4]


async def test_a_creation_that_is_sent_again_is_done(store: SessionStore) -> None:
    """The same for a creation; another session of the same id is a conflict."""
    for _ in range(2):
        assert await store.create(session_meta("s1"), log_entries("s1", 1, 1), KEY) is None
    with pytest.raises(Conflict, match="already"):
        await store.create(session_meta("s1"), [log_entry("s1", 1, "other")])


async def test_the_fence_goes_to_whoever_took_it_last(store: SessionStore, redis: Redis) -> None:
    """After another instance took a session over, this one can neither append nor repeat an append."""
    await store.create(session_meta("s1"), log_entries("s1", 1, 1))
    other = SessionStore(redis, "two")
    meta = await other.take_fence("s1")
    assert (meta.fence, meta.head_seq, meta.epoch) == ("two", 1, 1)
    for _ in range(2):
        with pytest.raises(FenceLost, match="two"):
            await store.append("s1", log_entries("s1", 2, 1), expected_head=1)
    await other.append("s1", log_entries("s1", 2, 1), expected_head=1)
    assert (await store.take_fence("s1")).head_seq == 2
    await store.append("s1", log_entries("s1", 3, 1), expected_head=2)


async def test_a_used_key_answers_what_it_answered_first(store: SessionStore) -> None:
    """The same key with the same body gives the first result and writes nothing; with another body it is a conflict."""
    await store.create(session_meta("s1"), log_entries("s1", 1, 1))
    assert await store.append("s1", [log_entry("s1", 2, "a")], expected_head=1, key=KEY) is None
    stored = StoredKey("hash", {"response_id": "r1"})
    again = replace(KEY, result={"response_id": "r2"})
    assert await store.append("s1", [log_entry("s1", 3, "b")], expected_head=2, key=again) == stored
    assert await store.find_key("s1", "k1") == stored
    with pytest.raises(IdempotencyConflict, match="k1"):
        await store.append("s1", [log_entry("s1", 3, "c")], expected_head=2, key=replace(KEY, body_hash="other"))
    assert await store.append("s1", [log_entry("s1", 3, "d")], expected_head=2, key=replace(KEY, key="k2")) is None
    assert [entry.seq for entry in await store.read_log("s1", 0, 10)] == [1, 2, 3]


async def test_a_creation_key_belongs_to_its_tenant(store: SessionStore) -> None:
    """The same key of two tenants is two keys; of one tenant, the second creation is a duplicate."""
    for tenant in ("acme", "other"):
        key = IdempotencyKey(tenant, "k1", "hash", {"session_id": f"s-{tenant}"})
        assert await store.create(session_meta(f"s-{tenant}", tenant), [], key) is None
        duplicate = await store.create(session_meta("s-new", tenant), [], replace(key, result={}))
        assert duplicate == StoredKey("hash", {"session_id": f"s-{tenant}"})
    assert await store.load_meta("s-new") is None


async def test_keys_live_a_day_and_expired_ones_go(store: SessionStore, redis: Redis) -> None:
    """A key is kept 24 hours; a later write takes those out whose time is over."""
    await store.create(session_meta("s1"), [], KEY)
    assert KEY_LIFETIME_S - 5 <= await redis.ttl("{s1}:keys") <= KEY_LIFETIME_S == 24 * 3600
    await redis.zadd("{s1}:keytimes", {"k1": 1})
    await store.append("s1", log_entries("s1", 1, 1), expected_head=0, key=replace(KEY, key="k2"))
    assert await redis.hkeys("{s1}:keys") == [b"k2"]
    assert await redis.zrange("{s1}:keytimes", 0, -1) == [b"k2"]


async def test_a_log_is_read_in_pages_and_trimmed(store: SessionStore) -> None:
    """Reading goes on after a cursor, a trimmed log begins later, and its sequence numbers are never used again."""
    await store.create(session_meta("s1"), log_entries("s1", 1, 25))
    pages = [await store.read_log("s1", after, 10) for after in (0, 10, 20, 25)]
    assert [[entry.seq for entry in page] for page in pages] == [
        list(range(1, 11)),
        list(range(11, 21)),
        list(range(21, 26)),
        [],
    ]
    await store.trim_log("s1", 24)
    assert await store.first_seq("s1") == 24
    await store.trim_log("s1", 26)
    assert await store.first_seq("s1") is None
    await store.append("s1", log_entries("s1", 26, 1), expected_head=25)
    assert await store.first_seq("s1") == 26


async def test_sessions_are_listed_newest_first_in_pages(store: SessionStore) -> None:
    """A page goes on after the last session of the page before, also where several changed in the same millisecond."""
    for number in range(7):
        await store.create(session_meta(f"s{number}", updated_at=1 + number // 3), [])
    await store.create(session_meta("t1", tenant="other", updated_at=99), [])
    await store.append("s1", [], expected_head=0, meta={"updated_at": 50})
    whole = [meta.id for meta in await store.list_sessions("acme")]
    assert whole == ["s1", "s6", "s5", "s4", "s3", "s2", "s0"]
    seen: list[str] = []
    while page := await store.list_sessions("acme", limit=3, before=seen[-1] if seen else None):
        seen += [meta.id for meta in page]
    assert seen == whole
    with pytest.raises(BadRequest, match="t1"):
        await store.list_sessions("acme", before="t1")


async def test_sessions_are_found_by_what_was_said(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """All words have to be there, in title or messages, in any case; names of fields and other tenants do not count."""
    monkeypatch.setattr(session_store, "SEARCHED_AT_ONCE", 2)
    for number in range(6):
        await store.create(replace(session_meta(f"s{number}", updated_at=number + 1), title=f"Trip {number}"), [])
    await store.create(session_meta("t1", tenant="other", updated_at=99), [])
    for name in ("s1", "s4", "t1"):
        said = replace(message_record(f"m-{name}"), text="Die Straße nach OSLO")
        await store.append(name, [], expected_head=0, messages=[said])

    async def found(*words: str, **options: Any) -> list[str]:
        return [meta.id for meta in await store.list_sessions("acme", words=words, **options)]

    assert await found("oslo", "STRASSE") == ["s4", "s1"]
    assert await found("oslo", "4") == ["s4"]
    assert await found("trip", limit=4) == ["s5", "s4", "s3", "s2"]
    assert await found("trip", limit=4, before="s2") == ["s1", "s0"]
    assert await found("oslo", limit=1, before="s4") == ["s1"]
    assert await found("token_ids") == []
    monkeypatch.setattr(session_store, "MAX_SEARCHED_SESSIONS", 2)
    assert await found("trip") == ["s5", "s4"]


async def test_deletion_reaches_everything_of_the_session(store: SessionStore, redis: Redis) -> None:
    """Nothing of a deleted session is left, no other session loses anything, and a late append does not revive it."""
    await store.create(session_meta("s2"), log_entries("s2", 1, 1))
    before = set(await redis.keys("*"))
    await store.create(replace(session_meta("s1"), active={"id": "r1"}), log_entries("s1", 1, 1), KEY)
    await store.append("s1", log_entries("s1", 2, 1), expected_head=1, messages=[message_record("m1")])
    await redis.hset("{s1}:record", "turns", "1")
    await redis.zadd("sessions:changes", {"s1": 1})
    assert await store.delete("s1", "acme")
    assert set(await redis.keys("*")) == before
    assert await redis.zrange("tenant:{acme}:sessions", 0, -1) == [b"s2"]
    assert await store.active_sessions() == []
    with pytest.raises(NotFound):
        await store.append("s1", log_entries("s1", 3, 1), expected_head=2)
    assert set(await redis.keys("*")) == before
    assert not await store.delete("s1", "acme")


async def test_another_tenant_cannot_delete(store: SessionStore) -> None:
    """Deletion checks the tenant in the same step."""
    await store.create(session_meta("s1"), [])
    assert not await store.delete("s1", "other")
    assert await store.load_meta("s1") is not None


async def test_a_fork_is_created_with_its_messages(store: SessionStore) -> None:
    """Any number of messages goes with a creation: more than a Lua call takes arguments."""
    messages = [message_record(f"m{number}", created_at=number) for number in range(9000)]
    await store.create(session_meta("s1"), log_entries("s1", 1, 1), messages=messages)
    assert list((await store.load_messages("s1")).values()) == messages


async def test_appends_of_many_sessions_keep_each_sessions_order(store: SessionStore) -> None:
    """Appends handed in together, several a session without waiting in between, all arrive, in order."""
    ids = [f"s{number}" for number in range(20)]
    for session_id in ids:
        await store.create(session_meta(session_id), [])
    appends = [
        store.append(session_id, log_entries(session_id, seq, 1), expected_head=seq - 1)
        for seq in range(1, 26)
        for session_id in ids
    ]
    assert await asyncio.gather(*appends) == [None] * len(appends)
    for session_id in ids:
        assert [entry.seq for entry in await store.read_log(session_id, 0, 100)] == list(range(1, 26))


async def test_one_refused_append_does_not_touch_the_others_of_its_batch(store: SessionStore) -> None:
    """In one batch, the append with a wrong head fails alone."""
    for session_id in ("s1", "s2", "s3"):
        await store.create(session_meta(session_id), [])
    results = await asyncio.gather(
        store.append("s1", log_entries("s1", 1, 1), expected_head=0),
        store.append("s2", log_entries("s2", 6, 1), expected_head=5),
        store.append("s3", log_entries("s3", 1, 1), expected_head=0),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [type(None), FenceLost, type(None)]


async def test_wire_bytes_of_any_kind_survive(store: SessionStore) -> None:
    """The log gives back exactly the bytes it was given."""
    wires = [bytes(range(256)), b"", b"\xc0" * 70_000]
    entries = [LogEntry(seq, wire, (0, 1, 2**31 - 1)) for seq, wire in enumerate(wires, 1)]
    await store.create(session_meta("s1"), entries)
    assert await store.read_log("s1", 0, 10) == entries


async def test_a_script_that_redis_forgot_is_loaded_again(store: SessionStore, redis: Redis) -> None:
    """After a restart of Redis, or a flush of its scripts, everything goes on."""
    await redis.script_flush()
    await store.create(session_meta("s1"), [])
    await redis.script_flush()
    both = [store.append("s1", log_entries("s1", seq, 1), expected_head=seq - 1) for seq in (1, 2)]
    assert await asyncio.gather(*both) == [None, None]
    await redis.script_flush()
    assert (await store.take_fence("s1")).head_seq == 2
    await redis.script_flush()
    assert await store.delete("s1", "acme")
