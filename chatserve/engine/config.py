"""What the front end tells a fresh engine before anything else: one frozen, validated value that travels as a map."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from chatserve.errors import StartupError
from chatserve.logs import LogFormat

DeviceName = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "dummy"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to load the model and how much to hold. What is None, `auto` or 0 is decided where the device is known.

    `kv_device_bytes` bounds the physical KV memory; `max_context` (tokens, prompt and reply) defaults to the model's;
    `max_step_tokens` bounds one step's prefill and decode together; `page_bytes` 0 derives it from the budget;
    `kv_host_bytes` and `kv_disk_bytes` below it are off with 0, the latter lies in the directory `kv_disk_path`;
    `num_threads` 0 leaves torch's default. `load_format` "dummy" fills the model with random weights.
    `prefix_sharing` off exists for comparisons. `log_level` and `log_format` are those of the front end.
    """

    model: str
    device: DeviceName = "auto"
    dtype: str = "auto"
    load_format: LoadFormat = "auto"
    kv_device_bytes: int | None = None
    kv_host_bytes: int | None = 0
    kv_disk_bytes: int | None = 0
    kv_disk_path: str = ""
    max_context: int | None = None
    max_step_tokens: int | None = None
    max_running: int | None = None
    max_waiting: int = 1024
    page_bytes: int = 0
    num_threads: int = 0
    prefix_sharing: bool = True
    log_level: str = "info"
    log_format: LogFormat = "console"

    def __post_init__(self) -> None:
        for name in ("kv_device_bytes", "max_step_tokens", "max_running", "max_waiting"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise StartupError(f"{name} is {value}; it must be at least 1")

    def as_map(self) -> dict[str, Any]:
        """The fields as they travel to the engine."""
        return asdict(self)

    @classmethod
    def from_map(cls, fields: dict[str, Any]) -> Self:
        """The reverse of `as_map`."""
        return cls(**fields)
