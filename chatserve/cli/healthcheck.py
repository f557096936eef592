"""`chatserve healthcheck`: ask a server whether it can serve now; for containers and supervisors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from chatserve.cli.connection_options import add_connection_options
from chatserve.client.errors import ClientError
from chatserve.client.http import HttpApi

DEFAULT_TIMEOUT_S = 5.0


def main(arguments: Sequence[str]) -> int:
    """Print what the server says of itself; 0 where it is ready, else 1."""
    parsed = _parser().parse_args(arguments)
    try:
        state = HttpApi(parsed.url, token=parsed.api_key, timeout_s=parsed.timeout).readiness()
    except (ClientError, ValueError) as error:
        print(f"chatserve healthcheck: {error}", file=sys.stderr)
        return 1
    missing = [name for name, good in state["checks"].items() if not good]
    print("ready" if state["ready"] else f"not ready: {', '.join(missing)}")
    return 0 if state["ready"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chatserve healthcheck",
        description="Ask a server whether a turn could start now. The exit status is 0 where it could, else 1.",
    )
    add_connection_options(parser)
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help=f"how long to wait for the answer (default: {DEFAULT_TIMEOUT_S:g})",
    )
    return parser
