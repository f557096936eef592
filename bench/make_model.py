"""A model directory without weights, for `chatserve serve --load-format dummy`: a known shape, the bundled tokenizer.

python bench/make_model.py bench/results/llama-3-8b --shape llama-3-8b
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

BUNDLED_DIRECTORY = Path(__file__).parent.parent / "chatserve" / "bundled" / "model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
EOS_TOKEN_ID = 2  # the bundled tokenizer's

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336,
        "vocab_size": 128_256, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5,
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
        "vocab_size": 151_936, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6,
    },
    "tiny": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256,
        "vocab_size": 4096, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip


def main() -> None:
    """Write the directory and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", help="bench/results/SHAPE by default")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--max-position", type=int, default=32_768, help="longest context, in tokens")
    arguments = parser.parse_args()
    directory = arguments.directory or Path("bench/results") / arguments.shape
    make_model(directory, arguments.shape, arguments.max_position)
    print(directory)


def make_model(directory: Path, shape: str, max_position: int) -> None:
    """Write config.json and the tokenizer's files; there are no weights."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(BUNDLED_DIRECTORY / name, directory / name)
    config = {
        **SHAPES[shape],
        "max_position_embeddings": max_position,
        "eos_token_id": EOS_TOKEN_ID,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    main()
