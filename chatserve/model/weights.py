"""Checkpoint files into a decoder: safetensors, one tensor at a time, each to its rows of a fused parameter.

The name table says where each tensor belongs and what shape it must have; anything missing, misshapen or without a
place is refused by name. Never holds two copies of the model: a shard is mapped from disk, not read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chatserve.errors import StartupError
from chatserve.model.config import ModelConfig
from chatserve.model.decoder import Decoder
from chatserve.pretrained import Pretrained

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_OUTPUT_WEIGHT = "lm_head.weight"
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)  # old checkpoints store what follows from their config
_IDENTITY_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
RANDOM_STD = 0.02
_WHOLE_TENSOR_BYTES = 1 << 20
_SAMPLE_BYTES = 4096
_SAMPLES_PER_TENSOR = 64
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class Place:
    """Where a checkpoint's tensor goes: rows [first_row, first_row + num_rows) of a parameter. `shape` is its own."""

    parameter: str
    first_row: int
    num_rows: int
    shape: tuple[int, ...]


def load_decoder(pretrained: Pretrained, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The checkpoint's decoder on `device`, its weights cast to `dtype` as they stream in.

    Raises `StartupError` naming the file or tensor that is missing, misshapen, unreadable or has no place.
    """
    decoder = Decoder(config, dtype=dtype, device=device)
    parameters = dict(decoder.named_parameters(remove_duplicate=False))
    places = name_table(config)
    filled: set[str] = set()
    for name, tensor in _stream(pretrained.directory):
        place = places.get(name)
        if place is not None:
            _fill(parameters[place.parameter], place, name, tensor)
            filled.add(name)
        else:
            _check_extra(pretrained.directory, config, name)
    _check_complete(pretrained.directory, places.keys() - filled)
    _check_tied(pretrained.directory, decoder)
    return decoder.eval()


def random_decoder(config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> Decoder:
    """A decoder of the config's shape with small random weights: it runs as fast as a real one and says nothing."""
    decoder = Decoder(config, dtype=dtype, device=device)
    torch.manual_seed(0)
    for name, parameter in decoder.named_parameters():
        if name.endswith("norm"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=RANDOM_STD)
    return decoder.eval()


def name_table(config: ModelConfig) -> dict[str, Place]:
    """Checkpoint tensor name to place, for every tensor a checkpoint of this config must have."""
    table = {
        "model.embed_tokens.weight": _whole("embedding", config.vocab_size, config.hidden_size),
        "model.norm.weight": _whole("final_norm", config.hidden_size),
    }
    if not config.tie_embeddings:
        table[_OUTPUT_WEIGHT] = _whole("lm_head", config.vocab_size, config.hidden_size)
    for index in range(config.num_layers):
        for name, place in _layer_places(config, f"layers.{index}"):
            table[f"model.layers.{index}.{name}"] = place
    return table


def config_fingerprint(directory: Path) -> bytes:
    """32 bytes that differ when the config or the tokenizer differ."""
    return _identity(directory).digest()


def weights_fingerprint(directory: Path) -> bytes:
    """32 bytes that differ when the weights, the config or the tokenizer differ, wherever the directory lies.

    Small files and small tensors count whole; of a large tensor 64 samples spread over it, its type, shape and size.
    Raises `StartupError` if the weights are missing or unreadable.
    """
    digest = _identity(directory)
    for path in _weight_files(directory):
        try:
            with path.open("rb") as file:
                _update_from_shard(digest, file)
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(path, error) from error
    return digest.digest()


def _identity(directory: Path) -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=32)
    for name in _IDENTITY_FILES:
        path = directory / name
        content = path.read_bytes() if path.is_file() else b""
        _update(digest, name.encode(), content)
    return digest


def _layer_places(config: ModelConfig, layer: str) -> Iterator[tuple[str, Place]]:
    """The places of one layer's tensors, by their names within the layer."""
    hidden, inner, q_size, kv_size = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    yield "input_layernorm.weight", _whole(f"{layer}.input_norm", hidden)
    yield "post_attention_layernorm.weight", _whole(f"{layer}.post_norm", hidden)
    qkv = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
    yield from _fused("self_attn", qkv, f"{layer}.qkv", hidden, bias=config.qkv_bias)
    yield from _fused("self_attn", {"o_proj": hidden}, f"{layer}.o", q_size, bias=config.o_bias)
    yield from _fused("mlp", {"gate_proj": inner, "up_proj": inner}, f"{layer}.gate_up", hidden, bias=config.mlp_bias)
    yield from _fused("mlp", {"down_proj": hidden}, f"{layer}.down", inner, bias=config.mlp_bias)
    if config.qk_norm:
        head = (config.head_dim,)
        yield "self_attn.q_norm.weight", Place(f"{layer}.qk_norm", 0, config.num_heads, head)
        yield "self_attn.k_norm.weight", Place(f"{layer}.qk_norm", config.num_heads, config.num_kv_heads, head)


def _fused(
    block: str, rows_by_name: Mapping[str, int], projection: str, in_size: int, *, bias: bool
) -> Iterator[tuple[str, Place]]:
    """Projections stored apart, stacked in this order in one `projection`."""
    first_row = 0
    for name, num_rows in rows_by_name.items():
        yield f"{block}.{name}.weight", Place(f"{projection}.weight", first_row, num_rows, (num_rows, in_size))
        if bias:
            yield f"{block}.{name}.bias", Place(f"{projection}.bias", first_row, num_rows, (num_rows,))
        first_row += num_rows


def _whole(parameter: str, *shape: int) -> Place:
    return Place(parameter, 0, shape[0], shape)


def _fill(parameter: Tensor, place: Place, name: str, tensor: Tensor) -> None:
    """Copy `tensor` to its rows, casting on the way; a head norm [head_dim] is repeated over its heads' rows."""
    if tuple(tensor.shape) != place.shape:
        raise StartupError(
            f"tensor {name!r} has shape {list(tensor.shape)} where config.json asks for {list(place.shape)}; "
            "the weights and the config do not belong together, download both again"
        )
    if not tensor.is_floating_point():
        raise StartupError(f"tensor {name!r} holds {tensor.dtype}; choose an unquantised (bf16) checkpoint")
    parameter[place.first_row : place.first_row + place.num_rows].copy_(tensor)


def _check_extra(directory: Path, config: ModelConfig, name: str) -> None:
    """Refuse a tensor without a place, except those known to say nothing new."""
    if name.endswith(_IGNORED_SUFFIXES) or (config.tie_embeddings and name == _OUTPUT_WEIGHT):
        return
    raise StartupError(
        f"{directory}: tensor {name!r} has no place in a {config.family} of this config.json; "
        "the weights and the config do not belong together, download both again"
    )


def _check_complete(directory: Path, missing: Set[str]) -> None:
    names = sorted(missing)
    if names:
        others = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise StartupError(
            f"{directory}: the weights lack {', '.join(names[:3])}{others}; download the checkpoint again"
        )


def _check_tied(directory: Path, decoder: Decoder) -> None:
    """A tied checkpoint may store its output weights a second time; other values there mean that it is not tied."""
    if not decoder.config.tie_embeddings:
        return
    embedding = decoder.embedding
    for name, tensor in _stream(directory, only=_OUTPUT_WEIGHT):
        if tensor.shape != embedding.shape or not torch.equal(tensor.to(embedding), embedding):
            raise StartupError(
                f"{directory}: tensor {name!r} differs from the embedding although config.json ties them; "
                "set tie_word_embeddings to false there"
            )


def _stream(directory: Path, *, only: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of every shard, or those named `only`, one after the other, mapped from disk."""
    for path in _weight_files(directory):
        try:
            with safe_open(path, framework="pt", device="cpu") as shard:
                for name in shard.keys():  # noqa: SIM118  (a handle, not a dict)
                    if only in (None, name):
                        yield name, shard.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error


def _weight_files(directory: Path) -> list[Path]:
    """The shards in name order. Raises `StartupError` if there are none or one is missing."""
    if (directory / _SINGLE_FILE).is_file():
        return [directory / _SINGLE_FILE]
    if not (directory / _INDEX_FILE).is_file():
        raise StartupError(
            f"{directory}: neither {_SINGLE_FILE} nor {_INDEX_FILE} there; only safetensors weights are read, "
            "convert others with transformers' save_pretrained"
        )
    paths = [directory / name for name in sorted(set(_weight_map(directory / _INDEX_FILE).values()))]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise StartupError(f"{missing}: named in {_INDEX_FILE} but not there; download the checkpoint again")
    return paths


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(index, error) from error
    return weight_map


def _unreadable(path: Path, error: Exception) -> StartupError:
    return StartupError(f"{path}: cannot be read ({type(error).__name__}: {error}); download it again")


def _update_from_shard(digest: Any, file: BinaryIO) -> None:
    """Add a safetensors file's header and samples of each tensor in the order of their names."""
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > _MAX_HEADER_BYTES:
        raise ValueError(f"header of {header_bytes} bytes")
    header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    for name in sorted(header):
        entry = header[name]
        begin, end = entry["data_offsets"]
        _update(digest, name.encode(), str((entry["dtype"], entry["shape"], end - begin)).encode())
        for offset, num_bytes in _samples(end - begin):
            file.seek(8 + header_bytes + begin + offset)
            _update(digest, file.read(num_bytes))


def _samples(num_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is read of a tensor: all of a small one, else samples from first to last byte."""
    if num_bytes <= _WHOLE_TENSOR_BYTES:
        yield 0, num_bytes
        return
    for sample in range(_SAMPLES_PER_TENSOR):
        yield (num_bytes - _SAMPLE_BYTES) * sample // (_SAMPLES_PER_TENSOR - 1), _SAMPLE_BYTES


def _update(digest: Any, *fields: bytes) -> None:
    """Add length-prefixed fields, so that no two lists of fields give the same bytes."""
    for field in fields:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
