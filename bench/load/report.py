"""From turns to figures: percentiles, rates, and the table that people read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from load.turns import Turn


def summary(turns: Sequence[Turn]) -> dict[str, Any]:
    """Every figure of one run, as plain values. Times to first token and between tokens in milliseconds."""
    good = [turn for turn in turns if turn.error is None and turn.arrivals]
    span_s = max((turn.ended_s for turn in good), default=0.0) - min((turn.began_s for turn in good), default=0.0)
    num_output = sum(turn.num_output for turn in good)
    numbers = sorted({turn.number for turn in good})
    return {
        "turns": len(good),
        "errors": dict(Counter(_error_of(turn) for turn in turns if turn not in good)),
        "seconds": span_s,
        "output_tokens": num_output,
        "output_tokens_per_s": num_output / span_s if span_s else 0.0,
        "ttft_ms": spread((turn.ttft_ms, 1.0) for turn in good),
        "inter_token_ms": spread(gap for turn in good for gap in turn.gaps_ms()),
        "by_turn": [_of_turn(number, [turn for turn in good if turn.number == number]) for number in numbers],
    }


def spread(weighted: Iterable[tuple[float, float]]) -> dict[str, float]:
    """Mean, median, 99th percentile and maximum of (value, weight) pairs; empty without any."""
    pairs = sorted(weighted)
    total = sum(weight for _, weight in pairs)
    if not pairs:
        return {}
    return {
        "mean": sum(value * weight for value, weight in pairs) / total,
        "p50": _percentile(pairs, 0.5 * total),
        "p99": _percentile(pairs, 0.99 * total),
        "max": pairs[-1][0],
    }


def lines(name: str, figures: dict[str, Any]) -> list[str]:
    """The table of one run."""
    table = [f"== {name}: {figures['turns']} turns in {figures['seconds']:.2f} s"]
    table.append(f"{'turn':>6} {'input':>8} {'cached':>8} {'restored':>8} {'TTFT p50':>10} {'p99':>10}   (tokens, ms)")
    for row in figures["by_turn"]:
        ttft = row["ttft_ms"]
        table.append(
            f"{row['turn'] + 1:>6} {row['input_tokens']:>8.0f} {row['cached_tokens']:>8.0f} "
            f"{row['restored_tokens']:>8.0f} "
            f"{ttft['p50']:>10.1f} {ttft['p99']:>10.1f}"
        )
    for title, key in (("all TTFT ms", "ttft_ms"), ("inter-token ms", "inter_token_ms")):
        if values := figures[key]:
            table.append(f"{title:>15}: p50 {values['p50']:.2f}  p99 {values['p99']:.2f}  max {values['max']:.2f}")
    table.append(f"{'output':>15}: {figures['output_tokens']:,} tokens, {figures['output_tokens_per_s']:,.0f} tokens/s")
    table += [f"{'error':>15}: {count} x {error}" for error, count in figures["errors"].items()]
    return table


def _of_turn(number: int, turns: Sequence[Turn]) -> dict[str, Any]:
    return {
        "turn": number,
        "input_tokens": sum(turn.num_input for turn in turns) / len(turns),
        "cached_tokens": sum(turn.num_cached for turn in turns) / len(turns),
        "restored_tokens": sum(turn.num_restored for turn in turns) / len(turns),
        "ttft_ms": spread((turn.ttft_ms, 1.0) for turn in turns),
    }


def _percentile(pairs: Sequence[tuple[float, float]], below: float) -> float:
    seen = 0.0
    for value, weight in pairs:
        seen += weight
        if seen >= below:
            return value
    return pairs[-1][0]


def _error_of(turn: Turn) -> str:
    return turn.error or "a reply without any token"
