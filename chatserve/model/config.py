"""What the decoder must know of a checkpoint, read from its transformers config through one table of families.

A family is a row: which projections have biases, whether queries and keys are normed. Whatever the decoder cannot
compute exactly is refused here by name, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from chatserve.errors import StartupError
from chatserve.pretrained import Pretrained, rope_frequencies

BiasRule = bool | str
"""Always, never, or as the named field of the checkpoint's config says."""


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table: the class name checkpoints state, and where the family departs from plain Llama."""

    architecture: str
    qkv_bias: BiasRule
    o_bias: BiasRule
    mlp_bias: BiasRule
    qk_norm: bool


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "attention_bias", "attention_bias", "mlp_bias", qk_norm=False),
    "mistral": Family("MistralForCausalLM", False, False, False, qk_norm=False),
    "qwen2": Family("Qwen2ForCausalLM", True, False, False, qk_norm=False),
    "qwen3": Family("Qwen3ForCausalLM", "attention_bias", "attention_bias", False, qk_norm=True),
}


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and constants of one decoder. `max_position` is the longest context in tokens.

    `inv_freq` [head_dim / 2] are radians per token; `attention_factor` scales cos and sin (1 but for yarn).
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    max_position: int
    eos_token_ids: tuple[int, ...]
    inv_freq: tuple[float, ...]
    attention_factor: float

    @property
    def q_size(self) -> int:
        """Columns of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim


def model_config(pretrained: Pretrained) -> ModelConfig:
    """Read the decoder's config from a checkpoint's. Raises `StartupError` naming what is not supported."""
    source = pretrained.config
    refusal = next(_refusals(source), None)
    if refusal is not None:
        raise StartupError(f"{pretrained.directory}/config.json: {refusal}")
    family = FAMILIES[source.model_type]
    rope = rope_frequencies(source)
    return ModelConfig(
        family=source.model_type,
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_layers=source.num_hidden_layers,
        num_heads=source.num_attention_heads,
        num_kv_heads=source.num_key_value_heads,
        head_dim=_head_dim(source),
        rms_norm_eps=source.rms_norm_eps,
        qkv_bias=_applies(family.qkv_bias, source),
        o_bias=_applies(family.o_bias, source),
        mlp_bias=_applies(family.mlp_bias, source),
        qk_norm=family.qk_norm,
        tie_embeddings=source.tie_word_embeddings,
        max_position=_max_position(source),
        eos_token_ids=pretrained.eos_token_ids,
        inv_freq=rope.inv_freq,
        attention_factor=rope.attention_factor,
    )


def _applies(rule: BiasRule, source: Any) -> bool:
    return bool(getattr(source, rule)) if isinstance(rule, str) else rule


def _head_dim(source: Any) -> int:
    return getattr(source, "head_dim", None) or int(source.hidden_size // source.num_attention_heads)


def _max_position(source: Any) -> int:
    """Yarn checkpoints state the length before scaling; what they are good for is that length times the factor."""
    stated, rope = int(source.max_position_embeddings), source.rope_parameters
    if rope.get("rope_type") != "yarn" or rope.get("factor") is None:
        return stated
    return max(stated, int(rope["original_max_position_embeddings"] * rope["factor"]))


def _refusals(source: Any) -> Iterator[str]:
    """Every reason not to serve this checkpoint, each with its remedy; the first one found is the one to report."""
    yield from _refuse_experts(source)
    yield from _refuse_architecture(source)
    yield from _refuse_quantisation(source)
    yield from _refuse_sizes(source)
    yield from _refuse_sliding_window(source)
    yield from _refuse_details(source)


def _refuse_experts(source: Any) -> Iterator[str]:
    counts = [getattr(source, field, None) for field in ("num_experts", "num_local_experts", "n_routed_experts")]
    if any(counts):
        yield (
            f"{source.model_type} is a mixture of {next(filter(None, counts))} experts, which is not supported; "
            "choose a dense Llama, Mistral, Qwen2 or Qwen3 checkpoint"
        )


def _refuse_architecture(source: Any) -> Iterator[str]:
    family = FAMILIES.get(source.model_type)
    stated = getattr(source, "architectures", None) or []
    if family is None:
        yield f"model_type {source.model_type!r} is not supported; choose one of {', '.join(FAMILIES)}"
    elif stated and family.architecture not in stated:
        yield f"architecture {stated[0]!r} does not generate text; choose a checkpoint of {family.architecture}"


def _refuse_quantisation(source: Any) -> Iterator[str]:
    quantisation = getattr(source, "quantization_config", None)
    if quantisation:
        method = quantisation.get("quant_method", "unnamed") if isinstance(quantisation, dict) else quantisation
        yield f"weights quantised with {method!r} are not supported; choose the unquantised (bf16) checkpoint"


def _refuse_sizes(source: Any) -> Iterator[str]:
    for field in _SIZES:
        value = getattr(source, field)
        if not isinstance(value, int) or value < 1:
            yield f"{field}={value!r} is no positive number; correct the field"
    if source.num_attention_heads % source.num_key_value_heads:
        yield (
            f"num_attention_heads={source.num_attention_heads} is no multiple of "
            f"num_key_value_heads={source.num_key_value_heads}; correct the field"
        )


def _refuse_sliding_window(source: Any) -> Iterator[str]:
    """A window is in use when some layer has one and the context can outgrow it."""
    window = getattr(source, "sliding_window", None)
    layer_types = getattr(source, "layer_types", None) or ["sliding_attention"]
    max_position = source.max_position_embeddings
    if window is not None and "sliding_attention" in layer_types and window < max_position:
        yield (
            f"sliding_window={window} is in use (max_position_embeddings={max_position}), which is not supported; "
            f"choose a checkpoint without it, or set max_position_embeddings to {window} to stay inside it"
        )


def _refuse_details(source: Any) -> Iterator[str]:
    """Fields that leave the family but change the arithmetic."""
    if source.hidden_act != "silu":
        yield f"hidden_act {source.hidden_act!r} is not supported; choose a checkpoint with 'silu'"
    if "rope_theta" not in source.rope_parameters:
        yield "rope_parameters differ by layer type, which is not supported; choose a checkpoint with one rope"
    if source.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial_rotary_factor other than 1 is not supported; choose a checkpoint that rotates whole heads"
