"""A crash-safe store of KV pages on local disk, below device and host memory.

It needs the standard library and a fast checksum, and knows neither the rest of `kvstore` nor what its keys stand for:

    with DiskTier(directory, budget_bytes=64 << 30, fingerprint=b"model and weights", page_bytes=8 << 20) as tier:
        tier.put([(key, payload)])           # durable when it returns
        length = tier.read(key, page)   # bytes, verified; None or a reason for a miss
"""

from kvstore.disk.errors import DirectoryInUse, DirectoryUnusable
from kvstore.disk.records import FORMAT_VERSION, Payload, Reason
from kvstore.disk.tier import BadPlace, DiskStats, DiskTier, TierState, Verification, open_existing

__all__ = [
    "FORMAT_VERSION",
    "BadPlace",
    "DirectoryInUse",
    "DirectoryUnusable",
    "DiskStats",
    "DiskTier",
    "Payload",
    "Reason",
    "TierState",
    "Verification",
    "open_existing",
]
