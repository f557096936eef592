"""`chatserve doctor`: what this machine has, which kernels a server would use, and a self-test of a few seconds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

# Loaded by name, after the arguments are known to be good: it takes seconds, and `--help` must not.
DOCTOR_MODULE = "chatserve.engine.doctor"


def main(arguments: Sequence[str]) -> int:
    """Print the findings; returns 1 when one of them would keep a server from working. Raises StartupError."""
    parser = argparse.ArgumentParser(prog="chatserve doctor", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what to test")
    device = parser.parse_args(arguments).device
    healthy = True
    for finding in import_module(DOCTOR_MODULE).examine(device):
        healthy &= finding.ok
        print(f"{'ok ' if finding.ok else 'BAD'}  {finding.name:<26}{finding.value}", flush=True)
    print("All is well." if healthy else "Something is wrong; see the lines marked BAD.")
    return 0 if healthy else 1
