"""What the engine decides by itself where the operator leaves it open: memory for attention history, and its limits.

Plain arithmetic on what the system reports; it imports neither torch nor CUDA.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MAX_HOST_KV_BYTES = 4 << 30
GPU_KV_PERCENT = 90
CPU_HOST_BYTES = 256 << 20  # copies on their way to disk; the device tier is main memory already
CPU_DISK_BYTES = 4 << 30
GPU_HOST_BYTES = 16 << 30  # at most; 130,000 tokens of an 8B model

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


def tier_bytes(device: str) -> tuple[int, int]:
    """Host memory and disk space for histories below a device of this type."""
    if device == "cpu":
        return CPU_HOST_BYTES, CPU_DISK_BYTES
    return min(usable_memory_bytes() // 4, GPU_HOST_BYTES), 0


def gpu_kv_bytes(free_bytes: int) -> int:
    """KV memory on a GPU that has `free_bytes` left once the model is loaded and its workspaces are made."""
    return free_bytes * GPU_KV_PERCENT // 100
