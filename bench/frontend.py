"""What a token costs the front end: a real server over an engine that only makes tokens.

256 sessions get a token each at every step. What counts is the processor time of the server's process, because
clients, Redis and the engine's double share the machine with it here.

    python bench/frontend.py [--via ws,completions] [--step-ms 15] [--profile /tmp/frontend.prof]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from load.clients import Task, run_clients
from load.report import summary
from load.server import started
from load.workloads import Workload

FLAGS = ("--max-running=512", "--max-key-connections=512", "--log-level=warning")


def main() -> None:
    """Measure each way and print a line for it."""
    arguments = parser().parse_args()
    print(
        f"{'via':>12} {'offered/s':>10} {'got/s':>10} {'us a token':>11} {'tokens/s a core':>16} {'TTFT':>9} {'p99':>7}"
    )
    for via in arguments.via.split(","):
        print(line(via, measure(via, arguments), arguments), flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--via", default="ws,completions")
    made.add_argument("--sessions", type=int, default=256)
    made.add_argument("--turns", type=int, default=2)
    made.add_argument("--tokens", type=int, default=256)
    made.add_argument("--step-ms", type=float, default=15.0)
    made.add_argument("--processes", type=int, default=2)
    made.add_argument("--profile", default="-")
    made.add_argument("--log", type=Path, default=Path("bench/results/frontend.log"))
    return made


def measure(via: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run, with the front end's processor time."""
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    workload = Workload("frontend", arguments.sessions, arguments.turns, 32, arguments.tokens)
    program = ("bench.load.double_server", str(arguments.step_ms), arguments.profile)
    with started(FLAGS, arguments.log, program) as server:
        task = Task(server.url, None, via, workload, "1", 1_536)
        run_clients(Task(server.url, None, via, Workload("warm-up", 4, 1, 32, 32), "0", 1_536), 1)
        before = server.cpu_s()["front end"]
        figures = summary(run_clients(task, arguments.processes))
        return figures | {"cpu_s": server.cpu_s()["front end"] - before}


def line(via: str, figures: dict[str, Any], arguments: argparse.Namespace) -> str:
    """One row of the table, and what went wrong."""
    offered = arguments.sessions * 1000 / arguments.step_ms
    per_token_s = figures["cpu_s"] / max(1, figures["output_tokens"])
    ttft = figures["ttft_ms"] or {"p50": 0.0, "p99": 0.0}
    row = (
        f"{via:>12} {offered:>10,.0f} {figures['output_tokens_per_s']:>10,.0f} {per_token_s * 1e6:>11.1f} "
        f"{1 / per_token_s if per_token_s else 0:>16,.0f} {ttft['p50']:>9.1f} {ttft['p99']:>7.1f}"
    )
    return row + "".join(f"\n  {count} x {error}" for error, count in figures["errors"].items())


if __name__ == "__main__":
    main()
