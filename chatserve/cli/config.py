"""`chatserve config show`: the settings that `chatserve serve` would have here, each with where it came from."""

from __future__ import annotations

import argparse
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chatserve.cli import serve
from chatserve.settings import CONFIG_FILE, ENV_PREFIX, ServeSettings, load_settings, option_of


def main(arguments: Sequence[str]) -> int:
    """Print the settings as a `chatserve.toml`; returns the exit status. Raises StartupError for a bad one."""
    _, flags = _parser().parse_known_args(arguments)
    given = vars(serve.parser().parse_args(flags))
    for line in config_lines(load_settings(given), given):
        print(line)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chatserve config",
        usage="chatserve config show [flags of serve ...]",
        description="Show the settings that `chatserve serve` would have with these flags, in this environment and "
        f"directory, as a {CONFIG_FILE}. Keys and passwords are not shown.",
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=["show"])
    return parser


def config_lines(settings: ServeSettings, flags: Mapping[str, Any]) -> Iterator[str]:
    """A line for every setting under the heading of its group; what is not set, or secret, is a comment."""
    sources = _sources(flags)
    group = None
    for name in ServeSettings.model_fields:
        if option_of(name).group != group:
            yield from [] if group is None else [""]
            group = option_of(name).group
            yield f"# {group}"
        yield _line(settings, name, sources.get(name, "default"))


def _line(settings: ServeSettings, name: str, source: str) -> str:
    value = getattr(settings, name)
    if name == "api_keys" and value:
        return f"# api_keys: those of {', '.join(key.tenant for key in value)}, from {source}"
    if name in ServeSettings.secret_fields and value:
        return f"# {name}: hidden, from {source}"
    if value is None or value == ():
        return f"# {name}: {option_of(name).default or 'none'}"
    return f"{name} = {_toml(value)}  # {source}"


def _toml(value: object) -> str:
    """Strings, numbers, flags and lists are written in TOML as in JSON."""
    if isinstance(value, tuple):
        return json.dumps(list(value), ensure_ascii=False)
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def _sources(flags: Mapping[str, Any]) -> dict[str, str]:
    """Where each setting that is no default was given; what counts more overwrites."""
    path = Path(CONFIG_FILE)
    in_file = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    environment = {name.upper() for name in os.environ}
    in_environment = [name for name in ServeSettings.model_fields if (ENV_PREFIX + name).upper() in environment]
    return (
        dict.fromkeys(in_file, CONFIG_FILE)
        | dict.fromkeys(in_environment, "environment")
        | dict.fromkeys(flags, "flag")
    )
