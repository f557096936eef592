"""How many tokens of attention history a GiB holds, by model: the table in README.md, from the shapes alone.

python bench/sizing.py [--bytes-per-number 2] [DIRECTORY ...]

A directory's `config.json` adds a row. One token takes layers x 2 (key, value) x key/value heads x head size numbers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 1 << 30


@dataclass(frozen=True)
class Shape:
    """What of a model decides its history's size."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int

    def token_bytes(self, number_bytes: int) -> int:
        """Bytes of one token's keys and values."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * number_bytes


SHAPES = (
    Shape("Qwen2.5-0.5B", 24, 2, 64),
    Shape("Llama-3.2-1B", 16, 8, 64),
    Shape("Llama-3.2-3B", 28, 8, 128),
    Shape("Qwen3-4B", 36, 8, 128),
    Shape("Qwen2.5-7B", 28, 4, 128),
    Shape("Mistral-7B-v0.3", 32, 8, 128),
    Shape("Llama-3.1-8B", 32, 8, 128),
    Shape("Qwen3-8B", 36, 8, 128),
    Shape("Qwen2.5-32B", 64, 8, 128),
    Shape("Llama-3.3-70B", 80, 8, 128),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directories", nargs="*", type=Path, metavar="DIRECTORY")
    parser.add_argument("--bytes-per-number", type=int, choices=(2, 4), default=2, help="2 on a GPU, 4 on a CPU")
    options = parser.parse_args(arguments)
    print("| model | KiB a token | tokens per GiB | sessions of 8k tokens in 16 GiB |")
    print("| --- | ---: | ---: | ---: |")
    for shape in (*SHAPES, *map(read_shape, options.directories)):
        print(row(shape, options.bytes_per_number))


def row(shape: Shape, number_bytes: int) -> str:
    """One model's line; figures are rounded down."""
    size = shape.token_bytes(number_bytes)
    return f"| {shape.name} | {size / 1024:g} | {GIB // size:,} | {16 * GIB // (size * 8192):,} |"


def read_shape(directory: Path) -> Shape:
    """The shape that a model directory's config.json states."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    return Shape(directory.name, config["num_hidden_layers"], config.get("num_key_value_heads", num_heads), head_dim)


if __name__ == "__main__":
    main()
