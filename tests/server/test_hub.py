"""The set of connections: bounds, notices, the end."""

import asyncio

import pytest

from chatserve.errors import Overloaded, Unavailable
from chatserve.server import hub as hub_module
from chatserve.server.hub import Hub


class Member:
    """A connection that remembers what it was told."""

    def __init__(self, tenant="alice"):
        self.tenant = tenant
        self.notices = []
        self.closed = None

    def notify(self, event):
        self.notices.append(event["type"])

    def close_soon(self, code, reason):
        self.closed = code


def test_room_in_all():
    """A connection counts from when it joins until it leaves."""
    hub = Hub(max_connections=1, max_key_connections=9)
    with hub.joined(Member()), pytest.raises(Overloaded):
        hub.check_room()
    hub.check_room()


def test_room_of_a_tenant():
    """Each tenant has its own bound."""
    hub = Hub(max_connections=9, max_key_connections=1)
    with hub.admitted("alice"):
        with hub.admitted("bob"):
            pass
        with pytest.raises(Overloaded), hub.admitted("alice"):
            pass
    with hub.admitted("alice"):
        pass


async def test_notices_reach_the_tenant():
    """Only the tenant's own connections hear that its list changed."""
    hub = Hub(max_connections=9, max_key_connections=9)
    alice, bob = Member(), Member("bob")
    with hub.joined(alice), hub.joined(bob):
        hub.sessions_changed("alice")
    assert (alice.notices, bob.notices) == (["sessions.changed"], [])


async def test_many_changes_are_told_of_once_in_a_while(monkeypatch):
    """The first at once, those that follow it together, and after a pause at once again."""
    monkeypatch.setattr(hub_module, "CHANGES_INTERVAL_S", 0.05)
    hub, member = Hub(max_connections=9, max_key_connections=9), Member()
    with hub.joined(member):
        for _ in range(100):
            hub.sessions_changed("alice")
        assert len(member.notices) == 1
        await asyncio.sleep(0.2)
        assert len(member.notices) == 2
        hub.sessions_changed("alice")
    assert len(member.notices) == 3


def test_drain():
    """Draining tells everybody and lets nobody in."""
    hub = Hub(max_connections=9, max_key_connections=9)
    member = Member()
    with hub.joined(member):
        hub.begin_drain(5.0)
    assert (member.notices, hub.draining) == (["goaway"], True)
    with pytest.raises(Unavailable):
        hub.check_room()


async def test_close_all_waits_for_the_last():
    """Closing waits until everybody has left, but no longer than it may."""
    hub = Hub(max_connections=9, max_key_connections=9)
    member = Member()
    with hub.joined(member):
        await hub.close_all(1012, "restart", 0.01)  # the member does not leave
        assert member.closed == 1012
        closing = asyncio.create_task(hub.close_all(1012, "restart", 5.0))
        await asyncio.sleep(0)
        assert not closing.done()
    await asyncio.wait_for(closing, 1)
