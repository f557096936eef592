"""The Lua that changes a session in one step, and the names of its keys in Redis.

Every script checks first and writes after, so a refusal leaves nothing behind; Redis 6.2 commands only. `commit` is
given one msgpack map (see `session_store`), answers `{status, ...}` and may be sent again when its outcome is unknown:
a commit that is already there answers `done` and writes nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

ACTIVE_SESSIONS = b"sessions:active"
RECORD_CHANGES = b"sessions:changes"
KEY_LIFETIME_S = 24 * 3600


def session_key(session_id: str, part: str) -> bytes:
    """The Redis key of one part of a session: meta, msgs, log, record."""
    return f"{{{session_id}}}:{part}".encode()


def scope_keys(scope: str) -> list[bytes]:
    """The two Redis keys of a scope of idempotency keys: what each stands for, and when it expires."""
    return [f"{{{scope}}}:keys".encode(), f"{{{scope}}}:keytimes".encode()]


def tenant_key(tenant: str) -> bytes:
    """The Redis key of a tenant's list of sessions, sorted by `updated_at`."""
    return f"tenant:{{{tenant}}}:sessions".encode()


def tenant_of_key(key: bytes) -> str:
    """The tenant whose list a key of `tenant_key` is."""
    return key.decode().removeprefix("tenant:{").removesuffix("}:sessions")


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and the hash that Redis knows it by once loaded."""

    source: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest())


_RUN_ID = """
local function current_run_id()
  return string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
end
"""

# KEYS: meta, msgs, log, active sessions, [keys, keytimes]. The tenant's list is found through the session's tenant.
COMMIT = Script(
    _RUN_ID
    + """
local meta, msgs, log, active, keys, keytimes = unpack(KEYS)
local new = cmsgpack.unpack(ARGV[1])

local function last_entry_is_ours()
  local last = new.entries[#new.entries]
  if not last then return false end
  local stored = redis.call('XRANGE', log, last[1], last[1])[1]
  return stored and stored[2][2] == last[2]
end

local function refusal()
  local row = redis.call('HMGET', meta, 'fence', 'head_seq')
  if new.create then
    if row[1] then return last_entry_is_ours() and {'done'} or {'exists'} end
    return nil
  end
  if not row[1] then return {'missing'} end
  if row[1] ~= new.fence then return {'fence', row[1]} end
  if row[2] ~= new.expected_head then return last_entry_is_ours() and {'done'} or {'head', row[2]} end
end

local function used_key()
  local stored = keys and redis.call('HGET', keys, new.key)
  return stored and {'duplicate', stored}
end

local function over_quota()
  local is_full = new.max_sessions and redis.call('ZCARD', new.list) >= tonumber(new.max_sessions)
  return is_full and {'full', new.max_sessions}
end

local function keep_key()
  local now = tonumber(redis.call('TIME')[1])
  for _, old in ipairs(redis.call('ZRANGEBYSCORE', keytimes, '-inf', now, 'LIMIT', 0, 64)) do
    redis.call('HDEL', keys, old)
    redis.call('ZREM', keytimes, old)
  end
  redis.call('HSET', keys, new.key, new.key_value)
  redis.call('ZADD', keytimes, now + new.key_lifetime_s, new.key)
  redis.call('EXPIRE', keys, new.key_lifetime_s)
  redis.call('EXPIRE', keytimes, new.key_lifetime_s)
end

local function write()
  for _, entry in ipairs(new.entries) do
    redis.call('XADD', log, entry[1], 'w', entry[2], 't', entry[3])
  end
  for _, message in ipairs(new.messages) do redis.call('HSET', msgs, message[1], message[2]) end
  redis.call('HSET', meta, unpack(new.set))
  if new.create then redis.call('HSET', meta, 'run_id', current_run_id()) end
  if #new.remove > 0 then redis.call('HDEL', meta, unpack(new.remove)) end
  if new.updated_at then
    local list = 'tenant:{' .. redis.call('HGET', meta, 'tenant') .. '}:sessions'
    redis.call('ZADD', list, new.updated_at, new.session_id)
  end
  if new.active == 'begin' then redis.call('SADD', active, new.session_id) end
  if new.active == 'end' then redis.call('SREM', active, new.session_id) end
  if keys then keep_key() end
end

local answer = refusal() or used_key() or over_quota()
if answer then return answer end
write()
return {'written'}
"""
)

# KEYS: meta. ARGV: fence, durable (1 or 0), acknowledged head or ''
TAKE_FENCE = Script(
    _RUN_ID
    + """
local meta, fence, durable, acknowledged = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])
local row = redis.call('HMGET', meta, 'fence', 'head_seq', 'run_id')
if not row[1] then return false end
local run_id = current_run_id()
local behind = acknowledged and tonumber(row[2]) < acknowledged
local unsure = not acknowledged and durable == '0' and row[3] and row[3] ~= run_id
if behind or unsure then redis.call('HINCRBY', meta, 'epoch', 1) end
redis.call('HSET', meta, 'fence', fence, 'run_id', run_id)
return redis.call('HGETALL', meta)
"""
)

# KEYS: meta, tenant's list, active sessions, record changes, then every other key of the session. ARGV: id, tenant
DELETE = Script("""
local meta, list, active, changes = unpack(KEYS)
if redis.call('HGET', meta, 'tenant') ~= ARGV[2] then return 0 end
redis.call('ZREM', list, ARGV[1])
redis.call('SREM', active, ARGV[1])
redis.call('ZREM', changes, ARGV[1])
redis.call('UNLINK', meta, unpack(KEYS, 5))
return 1
""")

# KEYS: meta, record, record changes. ARGV: id, time in milliseconds, then fields and values.
# A deleted session gets no record back.
TOUCH = Script("""
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[2], unpack(ARGV, 3))
redis.call('ZADD', KEYS[3], ARGV[2], ARGV[1])
return 1
""")
