"""Weights into the decoder: what is refused by name, how much memory it takes, and the fingerprint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatserve.errors import StartupError
from chatserve.model.config import model_config
from chatserve.model.weights import name_table, weights_fingerprint
from chatserve.pretrained import load_pretrained
from tests.model.checkpoints import FAMILIES, make_checkpoint
from tests.model.oracle import load

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint", "llama")


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tied", "llama", tie_word_embeddings=True)


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Apply `change` to the tensors of a single-file checkpoint."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refusal(directory: Path) -> str:
    with pytest.raises(StartupError) as caught:
        load(directory)
    return str(caught.value)


def test_projections_are_stacked_in_the_order_of_their_names(checkpoint: Path) -> None:
    """The fused parameters hold q, k, v and gate, up one below the other."""
    tensors, decoder = load_file(checkpoint / "model.safetensors"), load(checkpoint)
    layer = dict(decoder.named_parameters())
    attention = [tensors[f"model.layers.2.self_attn.{name}_proj.weight"] for name in "qkv"]
    feed_forward = [tensors[f"model.layers.2.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(layer["layers.2.qkv.weight"], torch.cat(attention))
    assert torch.equal(layer["layers.2.gate_up.weight"], torch.cat(feed_forward))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_name_table_fills_every_row_of_every_parameter_once(tmp_path: Path, family: str) -> None:
    """The places of a family's tensors cover each parameter without gap or overlap."""
    pretrained = load_pretrained(str(make_checkpoint(tmp_path, family)))
    rows: dict[str, list[int]] = {}
    for place in name_table(model_config(pretrained)).values():
        rows.setdefault(place.parameter, []).extend(range(place.first_row, place.first_row + place.num_rows))
    expected = {name: list(range(value.shape[0])) for name, value in load(tmp_path).named_parameters()}
    assert {name: sorted(found) for name, found in rows.items()} == expected


def test_missing_tensors_are_named(checkpoint: Path) -> None:
    """One missing tensor is named; of many, three are and the rest counted."""
    rewrite(checkpoint, lambda tensors: tensors.__delitem__(Q_PROJ))
    assert f"lack {Q_PROJ}; download" in refusal(checkpoint)

    def drop_layers(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    rewrite(checkpoint, drop_layers)
    assert "lack model.layers.1.input_layernorm.weight, " in refusal(checkpoint)
    assert " and 6 more; " in refusal(checkpoint)


def test_an_unexpected_shape_is_named_with_both_shapes(checkpoint: Path) -> None:
    """A tensor that would fit the memory but not the shape is refused."""
    rewrite(checkpoint, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].view(32, 128)}))
    assert f"'{Q_PROJ}' has shape [32, 128] where config.json asks for [64, 64]" in refusal(checkpoint)


def test_a_tensor_without_a_place_is_named(checkpoint: Path) -> None:
    """A bias that the config does not announce is not silently dropped."""
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(checkpoint, lambda tensors: tensors.update({name: torch.zeros(64)}))
    assert f"'{name}' has no place in a llama" in refusal(checkpoint)


def test_integer_weights_are_refused(checkpoint: Path) -> None:
    """Weights packed to integers without saying so in the config are still caught."""
    rewrite(checkpoint, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(torch.int8)}))
    assert f"'{Q_PROJ}' holds torch.int8; choose an unquantised" in refusal(checkpoint)


def test_stored_rope_frequencies_are_passed_over(checkpoint: Path) -> None:
    """Llama 2 checkpoints store frequencies that follow from their config."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(checkpoint, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert load(checkpoint).config.num_layers == 3


def test_a_tied_checkpoint_may_repeat_its_embedding(tied: Path) -> None:
    """Output weights equal to the embedding are the embedding; other values contradict the config."""
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tied, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    decoder = load(tied)
    assert decoder.lm_head is decoder.embedding
    rewrite(tied, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    assert "'lm_head.weight' differs from the embedding" in refusal(tied)
    assert "set tie_word_embeddings to false" in refusal(tied)


def test_an_untied_checkpoint_without_output_weights_is_refused(tied: Path) -> None:
    """Saying that they are not tied, the output weights must be there."""
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert "lack lm_head.weight" in refusal(tied)


def test_missing_weight_files_are_told_apart(checkpoint: Path, tmp_path: Path) -> None:
    """No weights at all, a missing shard and a broken index each say what to do."""
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    assert "only safetensors weights are read" in refusal(checkpoint)
    sharded = make_checkpoint(tmp_path / "sharded", "llama", max_shard_size="100KB")
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"{shard.name}: named in model.safetensors.index.json but not there" in refusal(sharded)
    (sharded / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json: cannot be read" in refusal(sharded)


@pytest.mark.parametrize("keep", [0, 5, 300, -100])
def test_a_cut_off_file_is_named(checkpoint: Path, keep: int) -> None:
    """An interrupted download is found before anything is served."""
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors: cannot be read" in refusal(checkpoint)


MEMORY_SCRIPT = """
import sys, threading, torch
from chatserve.model.config import model_config
from chatserve.model.weights import load_decoder
from chatserve.pretrained import load_pretrained

def private_bytes():
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(fields["RssAnon"].split()[0]) * 1024

pretrained = load_pretrained(sys.argv[1])
config = model_config(pretrained)
before, peak, done = private_bytes(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, private_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
decoder = load_decoder(pretrained, config, dtype=torch.float32, device=torch.device("cpu"))
done.set()
watcher.join()
held = sum(value.nbytes for value in decoder.parameters())
print((max(peak, private_bytes()) - before) / held)
"""


def test_loading_holds_one_copy_of_the_model(tmp_path: Path) -> None:
    """The most memory held at any time while loading is little more than the decoder itself."""
    make_checkpoint(tmp_path, "llama", hidden_size=512, intermediate_size=1536, head_dim=64, num_hidden_layers=16)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert 0.9 < float(done.stdout) < 1.25


def test_the_fingerprint_does_not_depend_on_the_place(checkpoint: Path, tmp_path: Path) -> None:
    """A copied directory is the same model."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert weights_fingerprint(checkpoint) == weights_fingerprint(copy)
    assert len(weights_fingerprint(checkpoint)) == 32


def test_the_fingerprint_sees_one_changed_weight(checkpoint: Path) -> None:
    """A single changed number in any tensor of a small model changes it."""

    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors[Q_PROJ][13, 7] += 1e-6

    before = weights_fingerprint(checkpoint)
    rewrite(checkpoint, nudge)
    assert weights_fingerprint(checkpoint) != before


def test_the_fingerprint_samples_large_tensors(tmp_path: Path) -> None:
    """Of a tensor above one megabyte the two ends and places between count."""
    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}
    first = make_checkpoint(tmp_path / "first", "llama", **shape)
    prints = {weights_fingerprint(first)}
    for row in (0, 1023):
        changed = shutil.copytree(first, tmp_path / f"row{row}")
        tensors = load_file(changed / "model.safetensors")
        tensors["model.layers.0.mlp.gate_proj.weight"][row].neg_()
        save_file(tensors, changed / "model.safetensors")
        prints.add(weights_fingerprint(changed))
    prints.add(weights_fingerprint(make_checkpoint(tmp_path / "seed", "llama", seed=1, **shape)))
    assert len(prints) == 4


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_the_fingerprint_sees_config_and_tokenizer(checkpoint: Path, name: str) -> None:
    """Changing how tokens are made or rotated makes another model."""
    before = weights_fingerprint(checkpoint)
    (checkpoint / name).write_text((checkpoint / name).read_text() + " ")
    assert weights_fingerprint(checkpoint) != before


def test_the_fingerprint_ignores_the_chat_template(checkpoint: Path) -> None:
    """How turns are rendered does not change what a token's keys and values are."""
    before = weights_fingerprint(checkpoint)
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    assert weights_fingerprint(checkpoint) == before


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{]"])
def test_the_fingerprint_of_a_broken_file_names_it(checkpoint: Path, content: bytes) -> None:
    """Garbage in place of weights is an error with the file's name, whatever the garbage."""
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(StartupError, match=r"model\.safetensors: cannot be read"):
        weights_fingerprint(checkpoint)
