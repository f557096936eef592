"""Tiny random checkpoints of every family, written by transformers and servable end to end.

Each directory holds config, safetensors, generation config and a byte-level BPE tokenizer with a ChatML template.
Weights are drawn wide enough that logits differ clearly; norms and biases are random too, so a forgotten one shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)

TRAINING_TEXT = [
    "system user assistant",
    "You are a helpful assistant. Answer in one short sentence.",
    "Hello! My name is Anna, and my dog is called Bello. What is my name?",
    "Your name is Anna. I live in Paris; my favourite colour is green.",
    "Please remember the numbers 1, 2, 3, 4, 5, 6, 7, 8, 9 and 10 for later.",
]

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
}


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer of a few hundred tokens that encodes any text and renders ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    tokenizer_class: Any = PreTrainedTokenizerFast  # untyped in transformers
    return tokenizer_class(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=_SHAPE["max_position_embeddings"],
    )


def make_model(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A random fp32 transformers model of `family` in eval mode; `overrides` replace config fields."""
    config_class, model_class = FAMILIES[family]
    settings = {**_SHAPE, "tie_word_embeddings": False, "sliding_window": None, "vocab_size": 384, **overrides}
    if family == "llama":
        settings.pop("sliding_window")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**settings)).eval()
        _randomise_vectors(model)
    return model


def make_checkpoint(
    directory: Path | str,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write a tiny random checkpoint of `family` (`llama`, `mistral`, `qwen2`, `qwen3`) and return its directory.

    `overrides` replace fields of the transformers config; a small `max_shard_size` ("40KB") gives several files.
    """
    tokenizer = make_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    settings = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        **overrides,
    }
    model = make_model(family, seed=seed, **settings).to(dtype)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def _randomise_vectors(model: torch.nn.Module) -> None:
    """Draw norm weights around 1 and biases around 0, which transformers leaves at exactly 1 and 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                centre = 0.0 if name.endswith("bias") else 1.0
                parameter.normal_(mean=centre, std=0.2)
