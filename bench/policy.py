"""Hit rates of the eviction policies on chat traffic: a public trace, and workloads made up here.

The trace is Mooncake's conversation trace: from https://github.com/kvcache-ai/Mooncake (Apache-2.0) take
`FAST25-release/traces/conversation_trace.jsonl` and pass its path, gzipped or not; its first 8,000 requests are
replayed, `--first` changes that. Without it only the made-up workloads are. Budgets are in tokens: of one tier, or of
several together. The rates of prefill only matter to the column `time saved` and to the policy `returns, by cost`; pass
those of your machine. Takes about two minutes on one core.

    python bench/policy.py [--trace conversation_trace.jsonl.gz] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl
from policy_sim.passes import measure_passes
from policy_sim.replay import Contender, replay_clairvoyant, replay_lru, replay_returns
from policy_sim.requests import Chat, Request, make_chat, make_scan, make_shift, read_trace

from kvstore.policy import TokenCosts

mpl.use("Agg")
from matplotlib import pyplot as plt

TRACE_BUDGETS = (260_000, 1_000_000, 5_000_000, 10_000_000)
MADE_UP_BUDGETS = (250_000, 1_000_000, 2_000_000)
STYLES = {"lru": "oC0-", "returns": "sC1-", "returns, by cost": "dC1:", "clairvoyant": "^C2--"}


@dataclass(frozen=True)
class Row:
    """One replay: rates are fractions of the tokens asked for, and of the seconds that computing them all takes."""

    workload: str
    budget_tokens: int
    policy: str
    hit_rate: float
    time_saved: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Replay, print the tables, and write what was asked for."""
    options = _parser().parse_args(arguments)
    costs = TokenCosts(options.token_bytes, options.prefill_rate, options.long_prefill_rate, options.long_context)
    rows: list[Row] = []
    for workload, requests, budgets in workloads(options.trace, options.first):
        print(f"\n{workload}: {len(requests)} requests, {sum(r.num_tokens for r in requests) / 1e6:.1f} million tokens")
        rows += measure(workload, requests, budgets, costs)
        print_table([row for row in rows if row.workload == workload])
    passes = measure_passes()
    print(f"\na planner's pass, 100,000 records, 2,000 sessions with pages: {passes}")
    if options.json:
        options.json.write_text(
            json.dumps({"rows": [asdict(row) for row in rows], "pass_ms": asdict(passes)}, indent=1)
        )
    if options.plot:
        plot(rows, options.plot)


def workloads(trace: Path | None, first: int | None) -> Iterator[tuple[str, list[Request], Sequence[int]]]:
    """Name, requests and budgets in tokens of each workload."""
    if trace is not None:
        yield "trace", read_trace(trace)[:first], TRACE_BUDGETS
    yield "chat", make_chat(Chat()), MADE_UP_BUDGETS
    yield "chat and scan", make_scan(), MADE_UP_BUDGETS
    yield "shifting chat", make_shift(), MADE_UP_BUDGETS


def contenders(costs: TokenCosts, *, with_costs: bool) -> dict[str, Contender]:
    """Policies by name. A hit rate counts tokens, so all cost the same; `by cost` weighs them by what they cost."""
    flat = TokenCosts.flat(costs.token_bytes, costs.prefill_tokens_per_s)
    found: dict[str, Contender] = {"lru": replay_lru, "returns": partial(replay_returns, policy_costs=flat)}
    if with_costs:
        found["returns, by cost"] = replay_returns
    return found | {"clairvoyant": replay_clairvoyant}


def measure(workload: str, requests: Sequence[Request], budgets: Sequence[int], costs: TokenCosts) -> list[Row]:
    """Every policy at every budget."""
    rows = []
    for budget in budgets:
        for name, replay in contenders(costs, with_costs=workload == "trace").items():
            score = replay(requests, budget, costs)
            rows.append(Row(workload, budget, name, score.hit_rate, score.time_saved))
    return rows


def print_table(rows: Sequence[Row]) -> None:
    """A line for each replay; `closed` is the part of the way from LRU to the clairvoyant."""
    print(f"{'budget':>12} {'policy':18} {'hit rate':>9} {'closed':>7} {'time saved':>11} {'closed':>7}")
    by_key = {(row.budget_tokens, row.policy): row for row in rows}
    for row in rows:
        lru, best = (by_key[row.budget_tokens, name] for name in ("lru", "clairvoyant"))
        hits = _closed(row.hit_rate, lru.hit_rate, best.hit_rate)
        time = _closed(row.time_saved, lru.time_saved, best.time_saved)
        print(f"{row.budget_tokens:12,} {row.policy:18} {row.hit_rate:9.2%} {hits:>7} {row.time_saved:11.2%} {time:>7}")


def plot(rows: Sequence[Row], path: Path) -> None:
    """A panel for each workload: hit rate over the budget, a line for each policy."""
    names = list(dict.fromkeys(row.workload for row in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(4.2 * len(names), 4), squeeze=False)
    for axes, workload in zip(panels[0], names, strict=True):
        for policy, style in STYLES.items():
            points = [(r.budget_tokens / 1e6, r.hit_rate) for r in rows if (r.workload, r.policy) == (workload, policy)]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=policy)
        axes.set(title=workload, xlabel="budget, million tokens", xscale="log", ylim=(0, None))
        budgets = sorted({row.budget_tokens / 1e6 for row in rows if row.workload == workload})
        axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.3)
    panels[0][0].set_ylabel("tokens reused / tokens asked for")
    panels[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    print(f"plot: {path}")


def _closed(value: float, lowest: float, highest: float) -> str:
    return f"{(value - lowest) / (highest - lowest):.1%}" if highest > lowest else "-"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="Mooncake's conversation trace, JSON lines, gzipped or not")
    parser.add_argument("--first", type=int, default=8000, help="requests of the trace to replay")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--plot", type=Path, help="where to draw them, as PNG")
    parser.add_argument("--token-bytes", type=int, default=131_072, help="of KV; the default is Llama 3 8B's in bf16")
    parser.add_argument("--prefill-rate", type=float, default=25_000.0, help="tokens per second at an empty context")
    parser.add_argument("--long-prefill-rate", type=float, default=12_500.0, help="the same at --long-context")
    parser.add_argument("--long-context", type=int, default=30_000, help="tokens")
    return parser


if __name__ == "__main__":
    main()
