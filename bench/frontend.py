"""What the front end costs and holds: a real server over an engine that only makes tokens, at a set rate.

    python bench/frontend.py [--run throughput,streams,idle,turns,stalled] [--connections 1000] [--profile FILE]

- throughput: 256 sessions get a token at every step of 15 ms; the processor time of the server's process counts.
- streams: connections that each hear 20 tokens a second; from the making of each token to its arrival.
- idle: connections that say nothing, and what they hold in memory.
- turns: one session of 1,000 turns.
- stalled: 200 readers stop reading, others go on.

Clients run in processes of their own, on the same machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from load.clients import Task, run_clients
from load.report import summary
from load.workloads import Workload
from streaming.runs import RUNS, Stage, double

THROUGHPUT = "throughput"


def main() -> None:
    """Run what is asked for, and print a few lines for each."""
    arguments = parser().parse_args()
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    stage = Stage(arguments.log, arguments.profile, arguments.connections, arguments.seconds, arguments.processes)
    for name in arguments.run.split(","):
        print(f"== {name}", flush=True)
        for line in throughput(stage, arguments) if name == THROUGHPUT else RUNS[name](stage):
            print(line, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--run", default=",".join([THROUGHPUT, *RUNS]), help="which, by name (default: all)")
    made.add_argument("--connections", type=int, nargs="*", default=[200, 400, 600, 800, 1000], help="of streams")
    made.add_argument("--seconds", type=float, default=15.0, help="of streams and stalled")
    made.add_argument("--via", default="ws,completions", help="of throughput")
    made.add_argument("--sessions", type=int, default=256, help="of throughput")
    made.add_argument("--turns", type=int, default=2, help="of throughput")
    made.add_argument("--tokens", type=int, default=256, help="of throughput, a turn")
    made.add_argument("--step-ms", type=float, default=15.0, help="of throughput")
    made.add_argument("--processes", type=int, default=1, help="of clients")
    made.add_argument("--profile", default="-", help="a file for the front end's cProfile statistics")
    made.add_argument("--log", type=Path, default=Path("bench/results/frontend.log"))
    return made


def throughput(stage: Stage, arguments: argparse.Namespace) -> list[str]:
    """A line for each way to the server."""
    head = (
        f"{'via':>12} {'offered/s':>10} {'got/s':>10} {'us a token':>11} {'tokens/s a core':>16} {'TTFT':>9} {'p99':>7}"
    )
    return [head, *(line(via, measure(via, stage, arguments), arguments) for via in arguments.via.split(","))]


def measure(via: str, stage: Stage, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run, with the front end's processor time."""
    workload = Workload("frontend", arguments.sessions, arguments.turns, 32, arguments.tokens)
    with double(stage, step_ms=arguments.step_ms) as server:
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
