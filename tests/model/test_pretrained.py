"""Finding a model: directories, the bundled one and hub names; config, tokenizer and stop tokens."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from chatserve import pretrained
from chatserve.errors import StartupError
from chatserve.pretrained import load_pretrained
from tests.model.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any look at the network an error."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"the network was asked for {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_a_directory_is_read_without_the_network(checkpoint: Path) -> None:
    """Config, generation config and tokenizer of a local directory never touch the network."""
    found = load_pretrained(str(checkpoint))
    assert found.directory == checkpoint
    assert found.config.model_type == "llama"
    assert found.tokenizer.decode(found.tokenizer.encode("a dog ünïcode 😀")) == "a dog ünïcode 😀"


def test_the_tokenizer_renders_its_chat_template(checkpoint: Path) -> None:
    """The tokenizer comes with the checkpoint's chat template, and is read once."""
    found = load_pretrained(str(checkpoint))
    messages = [{"role": "user", "content": "Hello"}]
    text = found.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert found.tokenizer is found.tokenizer


def test_an_engine_needs_no_tokenizer_files(checkpoint: Path, tmp_path: Path) -> None:
    """Without tokenizer files the config still loads; asking for the tokenizer says what is missing."""
    shutil.copy(checkpoint / "config.json", tmp_path)
    found = load_pretrained(str(tmp_path))
    with pytest.raises(StartupError, match=r"no usable tokenizer .*tokenizer\.json"):
        _ = found.tokenizer


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "expected"),
    [(2, [2, 0], (2, 0)), ([5, 6], 5, (5, 6)), (7, None, (7,)), (None, [3, 4], (3, 4)), (None, None, ())],
)
def test_eos_ids_come_from_both_files(
    tmp_path: Path, config_eos: object, generation_eos: object, expected: tuple[int, ...]
) -> None:
    """Every id either file names ends a reply, once."""
    fields = {"model_type": "llama", "eos_token_id": config_eos, "bos_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    assert load_pretrained(str(tmp_path)).eos_token_ids == expected


def test_a_missing_directory_is_named_with_the_ways_to_give_one(tmp_path: Path) -> None:
    """The text names the path and what else is accepted."""
    with pytest.raises(StartupError, match=r"no/such/place' is no directory here .* or 'bundled'"):
        load_pretrained(str(tmp_path / "no/such/place"))


def test_a_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """Naming the weights file instead of its directory says so."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(StartupError, match="is a file; give the directory"):
        load_pretrained(str(file))


@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "no config.json"), ("{", "cannot be read as JSON"), ("[]", "no JSON object")],
)
def test_a_directory_without_a_readable_config_is_refused(tmp_path: Path, content: str | None, named: str) -> None:
    """A missing, broken or foreign config.json is told apart."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(StartupError, match=named):
        load_pretrained(str(tmp_path))


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    """The file at fault is named."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(StartupError, match=r"generation_config\.json"):
        load_pretrained(str(tmp_path))


def test_bundled_resolves_to_the_installed_model(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name stands for the package's own directory, and says so when that is empty."""
    monkeypatch.setattr(pretrained, "BUNDLED_DIRECTORY", checkpoint)
    assert load_pretrained("bundled").directory == checkpoint
    monkeypatch.setattr(pretrained, "BUNDLED_DIRECTORY", tmp_path)
    with pytest.raises(StartupError, match="bundled model is not in this installation"):
        load_pretrained("bundled")


HUB_SCRIPT = """
import sys
from chatserve.errors import StartupError
from chatserve.pretrained import load_pretrained
try:
    found = load_pretrained(sys.argv[1])
    print(found.directory.name, found.eos_token_ids, len(found.tokenizer))
except StartupError as error:
    print("refused:", error)
"""


def run_offline(model: str, cache: Path) -> str:
    """What a fresh process with only `cache` for a hub prints; the hub library reads its settings at import."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", HUB_SCRIPT, model]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_hub_name_is_served_from_the_local_cache(checkpoint: Path, tmp_path: Path) -> None:
    """A model fetched before loads with the hub out of reach."""
    commit = "0" * 40
    repository = tmp_path / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    assert run_offline("owner/tiny", tmp_path) == f"{commit} (2, 0) 384\n"


def test_a_hub_name_out_of_reach_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """The text names the model and says to check the network or give a directory."""
    output = run_offline("owner/absent", tmp_path)
    assert output.startswith("refused: model 'owner/absent' is no directory here and could not be fetched")
    assert "give a local directory" in output
