"""The flags that every command talking with a running server shares."""

from __future__ import annotations

import argparse
import os

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "CHATSERVE_URL"
KEY_VARIABLE = "CHATSERVE_API_KEY"


def add_connection_options(parser: argparse.ArgumentParser) -> None:
    """`--url` and `--api-key`, with the environment as their default."""
    parser.add_argument(
        "--url",
        default=os.environ.get(URL_VARIABLE, DEFAULT_URL),
        help=f"address of the server (default: {URL_VARIABLE}, else {DEFAULT_URL})",
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE),
        metavar="KEY",
        help=f"key to present, if the server needs one (default: {KEY_VARIABLE}, which other users of this machine "
        "cannot read off the process list)",
    )
