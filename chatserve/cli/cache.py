"""`chatserve cache stats|verify|gc`: the page cache on disk, in a directory that no server has open."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatserve.errors import StartupError

if TYPE_CHECKING:
    from kvstore.disk import BadPlace, DiskTier

# Loaded by name, after the arguments are known to be good: its package loads torch, and `--help` must not.
DISK_MODULE = "kvstore.disk"


def main(arguments: Sequence[str]) -> int:
    """Run one of the subcommands; returns the exit status. Raises StartupError for a directory that cannot be used."""
    parsed = _parser().parse_args(arguments)
    action: Callable[[DiskTier, argparse.Namespace], int] = parsed.action
    with _open(parsed.dir) as tier:
        return action(tier, parsed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chatserve cache", description="The page cache on disk, without a server.")
    actions = parser.add_subparsers(required=True, metavar="stats | verify | gc")
    measuring = actions.add_parser("stats", help="print what the cache holds")
    measuring.set_defaults(action=_stats)
    verifying = actions.add_parser("verify", help="read every record; status 1 when one is not what was written")
    verifying.set_defaults(action=_verify)
    compacting = actions.add_parser("gc", help="delete what is not wanted any more, and say how much that was")
    compacting.set_defaults(action=_gc)
    for action in (measuring, verifying, compacting):
        action.add_argument("--dir", type=Path, required=True, help="the cache's directory")
        action.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _open(directory: Path) -> DiskTier:
    disk = import_module(DISK_MODULE)
    try:
        tier: DiskTier = disk.open_existing(directory)
    except (disk.DirectoryInUse, disk.DirectoryUnusable) as error:
        raise StartupError(str(error)) from error
    return tier


def _stats(tier: DiskTier, parsed: argparse.Namespace) -> int:
    _print(_facts(tier), as_json=parsed.json)
    return 0


def _verify(tier: DiskTier, parsed: argparse.Namespace) -> int:
    found = tier.verify()
    if parsed.json:
        print(json.dumps({"records": found.records, "bad": [_bad_as_object(bad) for bad in found.bad]}, indent=2))
        return int(bool(found.bad))
    for bad in found.bad:
        print(f"BAD  {bad.path} at byte {bad.offset}: {bad.reason} ({bad.detail})")
    print(f"{found.records} records read, {len(found.bad)} places are bad.")
    return int(bool(found.bad))


def _gc(tier: DiskTier, parsed: argparse.Namespace) -> int:
    freed_bytes = tier.compact()
    _print({"freed_bytes": freed_bytes, **_facts(tier)}, as_json=parsed.json)
    return int(tier.fault is not None)


def _facts(tier: DiskTier) -> dict[str, Any]:
    """What the cache is and holds, as `--json` prints it."""
    stats = tier.stats()
    return {
        "directory": str(tier.path),
        "fingerprint": tier.fingerprint.hex(),
        "page_bytes": tier.page_bytes,
        "records": stats.records,
        "live_bytes": stats.live_bytes,
        "file_bytes": stats.file_bytes,
        "budget_bytes": stats.budget_bytes,
        "segments": stats.segments,
        "rejected": dict(stats.rejected),
        "fault": stats.fault,
    }


def _bad_as_object(bad: BadPlace) -> dict[str, Any]:
    key = None if bad.key is None else bad.key.hex()
    return {"path": str(bad.path), "offset": bad.offset, "key": key, "reason": bad.reason, "detail": bad.detail}


def _print(facts: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for line in fact_lines(facts):
        print(line)


def fact_lines(facts: Mapping[str, Any]) -> list[str]:
    """Facts, a line each; those that are empty are left out, and bytes are in the unit that suits them."""
    return [f"{_label(name):<14}{_text(name, value)}" for name, value in facts.items() if value not in (None, {})]


def _label(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _text(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return size_text(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{count} {reason}" for reason, count in value.items())
    return str(value)


def size_text(num_bytes: int) -> str:
    """A number of bytes in the largest unit of which there is at least one."""
    power = min(4, max(0, (abs(num_bytes).bit_length() - 1) // 10))
    return f"{num_bytes} B" if power == 0 else f"{num_bytes / 1024**power:.1f} {'KMGT'[power - 1]}iB"
