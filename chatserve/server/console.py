"""What an operator sees on stderr: progress while the server loads, then where it is and what it holds."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from chatserve.engine.api import EngineInfo
from chatserve.settings import ServeSettings
from chatserve.version import __version__

logger = logging.getLogger(__name__)


def stderr_console() -> Console:
    """A console on what is stderr now."""
    return Console(file=sys.stderr, highlight=False)


@contextmanager
def loading_progress(console: Console) -> Iterator[Callable[[str], None]]:
    """Gives a function that shows what is being loaded: a spinner on a terminal, nothing elsewhere."""
    if not console.is_terminal:
        yield lambda what: None
        return
    with console.status("Starting") as status:
        yield status.update


def say_ready(console: Console, url: str, settings: ServeSettings, info: EngineInfo) -> None:
    """The block that says so, or one line where lines are for machines."""
    if settings.log_format == "console":
        print_summary(console, url, settings, info)
    else:
        logger.info("ready", extra={name.lower(): value for name, value in summary(url, settings, info)})


def print_summary(console: Console, url: str, settings: ServeSettings, info: EngineInfo) -> None:
    """The block that says the server is ready."""
    console.print(f"[bold]chatserve {__version__} is ready[/bold]")
    for name, value in summary(url, settings, info):
        console.print(f"  {name:<9} {value}", soft_wrap=True, markup=False)


def summary(url: str, settings: ServeSettings, info: EngineInfo) -> list[tuple[str, str]]:
    """The lines of the block: name and value."""
    return [
        ("URL", url),
        ("Model", f"{info.model} on {info.device} in {info.dtype}, up to {info.max_context:,} tokens a session"),
        ("Attention", info.attention),
        ("Capacity", f"{info.capacity_tokens:,} tokens of history on the device ({_kv_size(info)})"),
        ("Tiers", _tiers(settings, info)),
        ("Sessions", f"kept in {'the Redis given' if settings.redis_url else settings.data_dir.resolve()}"),
        ("Auth", _auth(settings)),
    ]


def _kv_size(info: EngineInfo) -> str:
    return f"{info.capacity_tokens * info.token_bytes / (1 << 20):,.0f} MiB, {info.token_bytes:,} bytes a token"


def _tiers(settings: ServeSettings, info: EngineInfo) -> str:
    if not info.has_tiers:
        return "none: a history that leaves the device is computed again"
    host, disk = (f"{size / (1 << 30):,.2f} GiB" for size in (info.host_bytes, info.disk_bytes))
    on_disk = f"{disk} of disk in {settings.kv_directory}" if info.disk_bytes else "no disk"
    return f"below it {host} of main memory, {on_disk}"


def _auth(settings: ServeSettings) -> str:
    if settings.keys:
        return f"on, {len(settings.keys)} key{'s' if len(settings.keys) > 1 else ''}"
    return "OFF, open to everyone who reaches this address" if settings.insecure else "off, this machine only"
