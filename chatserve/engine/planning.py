"""Evictions by what is known of sessions: which policy ranks histories, and the thread that keeps it informed.

Where no records are given, histories go by their age alone. It knows the store and a URL, not what keeps the records.
"""

from __future__ import annotations

from importlib import import_module

from kvstore import KVLayout, KVStore
from kvstore.planner import EvictionPlanner
from kvstore.policy import ReturnPolicy, TokenCosts

RECORDS_MODULE = "chatserve.storage.record_reader"  # loaded by name: an engine by itself needs no Redis
PREFILL_TOKENS_PER_S = 1000.0  # any rate gives the same order while all tokens cost the same


def eviction_policy(layout: KVLayout) -> ReturnPolicy:
    """The policy of an engine's store."""
    return ReturnPolicy(TokenCosts.flat(layout.token_bytes, PREFILL_TOKENS_PER_S))


def start_planner(redis_url: str, store: KVStore, policy: ReturnPolicy) -> EvictionPlanner:
    """A planner that reads the records in that Redis from now on."""
    records = import_module(RECORDS_MODULE).RedisRecordReader(redis_url)
    planner = EvictionPlanner(records, store.sessions, policy)
    planner.start()
    return planner
