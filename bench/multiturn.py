"""Multi-turn load on a server: time to first token by turn, time between tokens, tokens a second.

Sessions run in client processes of their own and begin at once; prompts are random token ids, greedy, without an early
end. Without `--url` a server is started, with what follows `--` as its arguments, and timed to its ready line.

    python bench/multiturn.py --workload chat64 --via ws,completions -- --model bench/results/llama-3-8b
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from load.clients import Task, default_processes, run_clients
from load.report import lines, summary
from load.server import Server, started
from load.workloads import WORKLOADS, Workload

WARM_UP = Workload("warm-up", 1, 2, 32, 16)


def main() -> None:
    """Run every workload over every way; print a table of each and write all figures as JSON."""
    own, server_arguments = split_arguments(sys.argv[1:])
    arguments = parser().parse_args(own)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    with server_at(arguments.url, server_arguments, arguments.json.with_suffix(".log")) as server:
        figures = measure(server, arguments)
    arguments.json.write_text(json.dumps(figures, indent=1))
    print(f"figures: {arguments.json}")
    raise SystemExit(any(run["errors"] for run in figures["runs"]))


def split_arguments(given: list[str]) -> tuple[list[str], list[str]]:
    """Ours, and the server's behind `--`."""
    place = given.index("--") if "--" in given else len(given)
    return given[:place], given[place + 1 :]


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are quick enough for the bundled model on a CPU."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--url", help="a running server; without it one is started")
    made.add_argument("--api-key", help="its key, where it has keys")
    made.add_argument("--via", default="ws,completions", help="ws, completions or both, comma-separated")
    made.add_argument("--workload", default="long-1k", help=f"comma-separated, of {', '.join(WORKLOADS)}")
    made.add_argument("--scale", type=float, default=None, help="factor on sessions and tokens")
    made.add_argument("--think", type=float, default=None, help="seconds between turns instead of the workload's")
    made.add_argument("--processes", type=int, default=default_processes(), help="client processes")
    made.add_argument("--seed", default="1")
    made.add_argument("--json", type=Path, default=Path("bench/results/multiturn.json"))
    return made


@contextmanager
def server_at(url: str | None, server_arguments: list[str], log: Path) -> Iterator[Server]:
    """The server at `url`, or one that is started."""
    if url:
        yield Server(url.rstrip("/"))
        return
    with started(server_arguments, log) as server:
        print(f"ready after {server.start_s:.2f} s: {server.url}")
        yield server


def measure(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    """All runs, one after the other, on one server."""
    about = server.get("/version", arguments.api_key)
    vocab_size = server.get("/v1/models", arguments.api_key)["data"][0]["vocab_size"]
    runs = []
    for name in arguments.workload.split(","):
        for via in arguments.via.split(","):
            seed = f"{arguments.seed}-{via}-{name}"
            task = Task(server.url, arguments.api_key, via, workload(name, arguments), seed, vocab_size)
            runs.append(run(server, task, arguments.processes))
    return {"start_s": server.start_s, "server": about, "peak_rss_mib": server.peak_rss_mib(), "runs": runs}


def workload(name: str, arguments: argparse.Namespace) -> Workload:
    """The workload as it is to be run."""
    found = WORKLOADS[name]
    if arguments.think is not None:
        found = replace(found, think_s=arguments.think)
    return found.scaled(arguments.scale) if arguments.scale is not None else found


def run(server: Server, task: Task, num_processes: int) -> dict[str, Any]:
    """One workload over one way, after a short one that warms both ends up."""
    run_clients(replace(task, workload=WARM_UP, seed=f"{task.seed}-warm-up"), 1)
    before = server.cpu_s()
    figures = summary(run_clients(task, num_processes))
    figures["cpu_s"] = {name: used - before.get(name, 0.0) for name, used in server.cpu_s().items()}
    title = f"{task.workload.name} via {task.via}"
    print("\n".join(lines(title, figures)))
    for name, used in figures["cpu_s"].items():
        print(f"{'cpu':>15}: {name} {used:.2f} s, {used * 1e6 / max(1, figures['output_tokens']):.0f} us a token")
    return {"workload": asdict(task.workload), "via": task.via, **figures}


if __name__ == "__main__":
    main()
