"""Model directories in Hugging Face format: where they are, their config, tokenizer, stop tokens and rope frequencies.

The only module that imports transformers. It knows names, files and the hub; it knows no weights and no decoder.
A local directory is read without touching the network; only a hub name ("owner/name") may download.
"""

from __future__ import annotations

import json
import re
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from transformers import CONFIG_MAPPING, ROPE_INIT_FUNCTIONS, AutoConfig, AutoTokenizer, GenerationConfig

from chatserve.errors import StartupError

BUNDLED_NAME = "bundled"
BUNDLED_DIRECTORY = Path(__file__).parent / "bundled" / "model"

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "tokenizer.model"]
_HUB_IGNORED = ["consolidated*", "original/*", "onnx/*"]  # the same weights again, in formats that are not read here
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SCALED_ROPE_TYPES = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class Pretrained:
    """A model directory that was found and whose config was read. `tokenizer` is read at its first use.

    `name` is what the operator asked for, `config` the transformers config (its fields differ by family), and
    `eos_token_ids` every id that ends a reply, without duplicates.
    """

    name: str
    directory: Path
    config: Any
    eos_token_ids: tuple[int, ...]

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer with its chat template. Raises `StartupError` if its files cannot be read."""
        if not any((self.directory / name).is_file() for name in _TOKENIZER_FILES):
            # Some versions of transformers answer with a tokenizer without a vocabulary instead of an error.
            raise StartupError(_no_tokenizer_text(self.directory, "no vocabulary there"))
        try:
            return AutoTokenizer.from_pretrained(self.directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise StartupError(_no_tokenizer_text(self.directory, _first_line(error))) from error


@dataclass(frozen=True, slots=True)
class RopeFrequencies:
    """Rotary embedding of one model: `inv_freq` [head_dim / 2] in radians per token, factor on cos and sin."""

    inv_freq: tuple[float, ...]
    attention_factor: float


def load_pretrained(model: str) -> Pretrained:
    """Find `model` (a directory, a hub name "owner/name", or "bundled") and read its config; no weights, no tokenizer.

    Raises `StartupError` naming what is missing or not understood.
    """
    directory = _locate(model)
    config = _read_config(directory)
    return Pretrained(model, directory, config, _eos_token_ids(directory, config))


def rope_frequencies(config: Any) -> RopeFrequencies:
    """The frequencies of a transformers config with rope type default, linear, llama3 or yarn, in fp32.

    Raises `StartupError` naming any other type.
    """
    parameters = config.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        return RopeFrequencies(_default_inv_freq(config), 1.0)
    if rope_type not in _SCALED_ROPE_TYPES:
        raise StartupError(
            f"rope scaling {rope_type!r} is not supported (default, {', '.join(_SCALED_ROPE_TYPES)} are); "
            "remove it from config.json to serve the context the model was trained with, or choose another checkpoint"
        )
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config)
    return RopeFrequencies(tuple(inv_freq.tolist()), float(attention_factor))


def _default_inv_freq(config: Any) -> tuple[float, ...]:
    """Unscaled frequencies: linear scaling by 1, because transformers' table has no entry for the default type."""
    unscaled = copy(config)
    unscaled.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": 1.0}
    inv_freq, _ = ROPE_INIT_FUNCTIONS["linear"](unscaled)
    return tuple(inv_freq.tolist())


def _locate(model: str) -> Path:
    if model == BUNDLED_NAME:
        return _bundled_directory()
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise StartupError(f"model {model!r} is a file; give the directory that holds config.json and the weights")
    if _HUB_NAME.fullmatch(model):
        return _download(model)
    raise StartupError(
        f"model {model!r} is no directory here and no hub name; "
        "give a directory in Hugging Face format, a name like 'Qwen/Qwen2.5-0.5B-Instruct', or 'bundled'"
    )


def _bundled_directory() -> Path:
    if not (BUNDLED_DIRECTORY / "config.json").is_file():
        raise StartupError(
            f"the bundled model is not in this installation ({BUNDLED_DIRECTORY}); "
            "install chatserve again, or name another model"
        )
    return BUNDLED_DIRECTORY


def _download(name: str) -> Path:
    """The hub's snapshot of `name`, from the local cache when it is complete or the hub is out of reach."""
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise StartupError(
            f"model {name!r} is no directory here and could not be fetched from the hub ({_first_line(error)}); "
            "check the name and the network (HF_TOKEN for gated models), or give a local directory"
        ) from error


def _read_config(directory: Path) -> Any:
    fields = _read_json(directory / "config.json")
    model_type = fields.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise StartupError(
            f"{directory}/config.json: model_type {model_type!r} is not known to the installed transformers; "
            "choose a Llama, Mistral, Qwen2 or Qwen3 checkpoint"
        )
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise StartupError(f"{directory}/config.json: {_first_line(error)}; correct the field it names") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StartupError(
            f"{path.parent}: no {path.name} there; give a model directory in Hugging Face format"
        ) from error
    except (OSError, ValueError) as error:
        raise StartupError(f"{path}: cannot be read as JSON ({_first_line(error)}); download it again") from error
    if not isinstance(fields, dict):
        raise StartupError(f"{path}: holds no JSON object; download it again")
    return fields


def _eos_token_ids(directory: Path, config: Any) -> tuple[int, ...]:
    """Ids from generation_config.json and config.json: families differ in which of them lists all."""
    found = _as_ids(config.eos_token_id)
    if (directory / "generation_config.json").is_file():
        found = _as_ids(_read_generation_config(directory).eos_token_id) + found
    return tuple(dict.fromkeys(found))


def _read_generation_config(directory: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise StartupError(
            f"{directory}/generation_config.json: {_first_line(error)}; correct it or remove the file"
        ) from error


def _no_tokenizer_text(directory: Path, reason: str) -> str:
    return (
        f"{directory}: no usable tokenizer ({reason}); "
        "the directory must hold the model's tokenizer.json and tokenizer_config.json"
    )


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
