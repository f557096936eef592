"""What the engine decides by itself where the operator leaves it open: memory for attention history, and its limits.

Plain arithmetic on what the system reports; it imports neither torch nor CUDA.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

MAX_HOST_KV_BYTES = 4 << 30
GPU_KV_PERCENT = 90
CPU_HOST_BYTES = 256 << 20  # copies on their way to disk; the device tier is main memory already
GPU_HOST_BYTES = 16 << 30  # at most; 130,000 tokens of an 8B model
CPU_DISK_BYTES = 4 << 30  # at most
GPU_DISK_BYTES = 64 << 30  # at most
LEAST_DISK_PART = 64  # less than such a part of these is not worth having

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How many requests generate at the same time, and how many tokens one step computes for all of them."""

    max_running: int
    max_step_tokens: int


CPU_LIMITS = EngineLimits(max_running=64, max_step_tokens=256)
GPU_LIMITS = EngineLimits(max_running=256, max_step_tokens=2048)


def default_limits(device: str) -> EngineLimits:
    """The limits on a device type, `cpu` or `cuda`."""
    return CPU_LIMITS if device == "cpu" else GPU_LIMITS


def host_kv_bytes() -> int:
    """KV memory on the CPU: a quarter of what this process may use, at most 4 GiB."""
    return min(usable_memory_bytes() // 4, MAX_HOST_KV_BYTES)


def usable_memory_bytes() -> int:
    """Main memory that this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return min(total, int(limit)) if limit.isdigit() else total


def host_tier_bytes(device: str) -> int:
    """Host memory for histories below a device of this type."""
    return CPU_HOST_BYTES if device == "cpu" else min(usable_memory_bytes() // 4, GPU_HOST_BYTES)


def disk_tier_bytes(device: str, directory: Path) -> int:
    """Disk space for histories in this directory: a quarter of what it could have; 0 where that is next to nothing."""
    most = CPU_DISK_BYTES if device == "cpu" else GPU_DISK_BYTES
    exists = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    taken = sum(file.stat().st_size for file in directory.glob("*") if file.is_file())
    share = (shutil.disk_usage(exists).free + taken) // 4
    return min(most, share) if share >= most // LEAST_DISK_PART else 0


def gpu_kv_bytes(free_bytes: int) -> int:
    """KV memory on a GPU that has `free_bytes` left once the model is loaded and its workspaces are made."""
    return free_bytes * GPU_KV_PERCENT // 100
