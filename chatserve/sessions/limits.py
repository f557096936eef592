"""Every bound and default of sessions and turns, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Defaults are the documented ones; times in seconds.

    The sampling fields stand in where neither the command nor the session gives a value; `temperature` 0 is greedy.
    A delta is sent `delta_interval_s` after the one before it, or sooner with `delta_tokens` tokens waiting. While the
    store is away a turn holds back `turn_buffer_bytes` of text for `turn_buffer_s`, then it ends. Conversations
    that are sent whole are looked for among `max_histories` replies, at first those of a tenant's newest
    `histories_read` sessions.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_output_tokens: int = 1024

    delta_interval_s: float = 0.02
    delta_tokens: int = 32
    turn_buffer_bytes: int = 1 << 20
    turn_buffer_s: float = 30.0
    store_retry_s: float = 0.1
    cancel_grace_s: float = 5.0
    requeue_delay_s: float = 1.0

    max_idle_sessions: int = 256
    tail_entries: int = 512
    tail_bytes: int = 1 << 18
    read_entries: int = 64
    max_resume_events: int = 4096
    max_recoveries: int = 16
    max_compared_sessions: int = 64
    max_histories: int = 1 << 15
    histories_read: int = 32

    resume_ttl_s: float = 600.0
    trim_interval_s: float = 15.0
