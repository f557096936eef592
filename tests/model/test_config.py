"""Which checkpoints are served, which are refused, and what the refusal says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from chatserve.errors import StartupError
from chatserve.model.config import ModelConfig, model_config
from chatserve.model.rope import rope_table, rotate, select_positions
from chatserve.pretrained import load_pretrained, rope_frequencies
from tests.model.checkpoints import FAMILIES

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
}


def write_config(directory: Path, family: str, **fields: Any) -> None:
    """A config.json as the hub has them, with the rope fields spelled the way older checkpoints do."""
    architecture = FAMILIES[family][1].__name__ if family in FAMILIES else "SomeForCausalLM"
    content = {"model_type": family, "architectures": [architecture], "rope_theta": 10000.0, **SHAPE, **fields}
    (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")


def read(directory: Path) -> ModelConfig:
    return model_config(load_pretrained(str(directory)))


REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "mistral v0.1": ("mistral", {"sliding_window": 4096}, "sliding_window=4096", "set max_position_embeddings to 4096"),
    "qwen2 window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 2},
        "sliding_window=1024",
        "choose a checkpoint without it",
    ),
    "qwen3 window in layer types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 512,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
        "sliding_window=512",
        "choose a checkpoint without it",
    ),
    "mixtral": ("mixtral", {"num_local_experts": 8}, "mixture of 8 experts", "choose a dense"),
    "qwen3 moe": ("qwen3_moe", {"num_experts": 16}, "mixture of 16 experts", "choose a dense"),
    "quantised": (
        "llama",
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        "quantised with 'awq'",
        "choose the unquantised",
    ),
    "other architecture": ("gpt_neox", {}, "'gpt_neox' is not supported", "choose one of llama, mistral"),
    "unheard of": ("llama9", {}, "'llama9' is not known", "choose a Llama"),
    "no model type": ("", {"model_type": None}, "model_type None is not known", "choose a Llama"),
    "classifier": (
        "llama",
        {"architectures": ["LlamaForSequenceClassification"]},
        "'LlamaForSequenceClassification' does not generate",
        "choose a checkpoint of LlamaForCausalLM",
    ),
    "dynamic rope": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope scaling 'dynamic'",
        "remove it",
    ),
    "longrope": (
        "llama",
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
        "rope scaling 'longrope'",
        "remove it",
    ),
    "partial rotary": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "rotates whole heads"),
    "gelu": ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'", "choose a checkpoint with 'silu'"),
    "uneven heads": ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3", "correct the field"),
    "no layers": ("qwen2", {"num_hidden_layers": 0, "layer_types": []}, "num_hidden_layers=0", "correct the field"),
    "text for a number": ("llama", {"num_hidden_layers": "four"}, "num_hidden_layers", "correct the field"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_checkpoint_is_refused_by_name_with_the_remedy(tmp_path: Path, case: str) -> None:
    """The refusal names the file, the field with its value, and what to do."""
    family, fields, named, remedy = REFUSED[case]
    write_config(tmp_path, family, **fields)
    with pytest.raises(StartupError) as caught:
        read(tmp_path)
    assert named in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 32768}),
        ("mistral", {"sliding_window": 4096, "max_position_embeddings": 4096}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 4}),
    ],
)
def test_a_window_that_no_token_can_leave_is_served(tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    """A sliding window stated but not in use is no reason to refuse."""
    write_config(tmp_path, family, **fields)
    assert read(tmp_path).family == family


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("llama", {}, (False, False, False, False)),
        ("llama", {"attention_bias": True, "mlp_bias": True}, (True, True, True, False)),
        ("mistral", {"sliding_window": None}, (False, False, False, False)),
        ("qwen2", {}, (True, False, False, False)),
        ("qwen3", {}, (False, False, False, True)),
        ("qwen3", {"attention_bias": True}, (True, True, False, True)),
    ],
)
def test_a_family_is_a_row_of_biases_and_norms(
    tmp_path: Path, family: str, fields: dict[str, Any], expected: tuple[bool, ...]
) -> None:
    """Each family's biases and query-key norm are those of its checkpoints."""
    write_config(tmp_path, family, **fields)
    config = read(tmp_path)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == expected


def test_head_dim_comes_from_the_config_or_from_the_hidden_size(tmp_path: Path) -> None:
    """An explicit head_dim wins; without one the hidden size is divided among the heads."""
    write_config(tmp_path, "llama")
    assert read(tmp_path).head_dim == 16
    write_config(tmp_path, "llama", head_dim=32)
    config = read(tmp_path)
    assert (config.head_dim, config.q_size, config.kv_size) == (32, 128, 64)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 32768),
        ({"type": "linear", "factor": 4.0}, 32768),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}, 32768),
        ({"type": "yarn", "factor": 4.0}, 131072),
    ],
)
def test_max_position_is_the_scaled_length_for_yarn(
    tmp_path: Path, scaling: dict[str, Any] | None, expected: int
) -> None:
    """Yarn checkpoints are good for their original length times the factor; others for the length they state."""
    write_config(tmp_path, "qwen2", rope_scaling=scaling)
    assert read(tmp_path).max_position == expected


def test_rotation_at_far_positions_equals_transformers(tmp_path: Path) -> None:
    """The table at positions up to 131,071 gives transformers' cos and sin, yarn's attention factor included."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    write_config(tmp_path, "qwen3", rope_scaling=scaling, head_dim=16)
    config = read(tmp_path)
    positions = torch.tensor([0, 1, 4095, 32768, 131071])
    table = rope_table(config, dtype=torch.float32, device=torch.device("cpu"))
    cos, sin = select_positions(table, positions)
    oracle = Qwen3RotaryEmbedding(Qwen3Config.from_pretrained(tmp_path))
    expected_cos, expected_sin = oracle(torch.empty(1), positions[None])
    first_halves = torch.cat((-expected_sin[0, :, :8], expected_sin[0, :, 8:]), dim=-1)
    assert torch.equal(cos[:, 0], expected_cos[0])
    assert torch.equal(sin[:, 0], first_halves)
    assert config.attention_factor > 1.1


def test_rotate_turns_pairs_of_halves_by_the_angle() -> None:
    """A quarter turn sends (x, y) to (-y, x), where x and y are the halves of a head."""
    head = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    cos, sin = torch.zeros(1, 1, 4), torch.tensor([[[-1.0, -1.0, 1.0, 1.0]]])
    assert rotate(head, cos, sin).tolist() == [[[-3.0, -4.0, 1.0, 2.0]]]


def test_reading_frequencies_leaves_the_config_as_it_was() -> None:
    """The default type is computed on a copy of the checkpoint's config."""
    config = LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    rope_frequencies(config)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 7.0}
