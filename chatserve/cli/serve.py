"""`chatserve serve`: a flag for every field of the settings, then the server. The fields are listed nowhere else."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from pydantic.fields import FieldInfo

from chatserve.settings import CONFIG_FILE, ENV_PREFIX, ServeSettings, flag_of, load_settings, option_of

# Loaded by name, after the settings are known to be good: it takes seconds, and `--help` must not.
SERVER_MODULE = "chatserve.server.run"


def main(arguments: Sequence[str]) -> int:
    """Serve until a signal comes; returns the exit status. Raises StartupError."""
    settings = load_settings(vars(parser().parse_args(arguments)))
    if sys.stderr.isatty():
        print("Starting chatserve", file=sys.stderr)
    _go_without_torch()
    status: int = import_module(SERVER_MODULE).run(settings)
    return status


def _go_without_torch() -> None:
    """Let no import find torch in this process, which computes nothing: the engine is another one.

    Where transformers finds it, reading a tokenizer loads it whole: seconds, and hundreds of megabytes.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # the documented way to make an import fail


def parser() -> argparse.ArgumentParser:
    """The flags of every setting, in groups. A flag that is not given leaves no trace in the namespace."""
    made = argparse.ArgumentParser(
        prog="chatserve serve",
        description="Serve a model. The only line on standard output is a JSON object with the server's url, "
        "printed when it is ready.",
        epilog=f"Sizes read 32k or 4G. Each setting can also be given as {ENV_PREFIX}NAME in the environment or as "
        f"name in {CONFIG_FILE}, with underscores for dashes (lists: {ENV_PREFIX}API_KEYS, "
        f"{ENV_PREFIX}ALLOWED_ORIGINS, comma-separated); a flag goes before the environment, that before the file.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in ServeSettings.model_fields.items():
        title = option_of(name).group
        if title not in groups:
            groups[title] = made.add_argument_group(title)
        _add_flag(groups[title], name, field)
    return made


def _add_flag(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    option = option_of(name)
    if field.annotation is bool:
        group.add_argument(flag_of(name), dest=name, action="store_true", help=_escaped(str(field.description)))
        return
    action = "append" if option.repeat else "store"
    repeated = " May be given more than once." if option.repeat else ""
    default = option.default or field.default
    help_text = _escaped(f"{field.description}{repeated} (default: {default})")
    group.add_argument(flag_of(name), dest=name, action=action, metavar=option.metavar, help=help_text)


def _escaped(text: str) -> str:
    """Text as argparse wants it, which fills in what follows a percent sign."""
    return text.replace("%", "%%")
