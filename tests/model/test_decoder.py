"""The decoder against transformers' own forward, for every family, rope type and way of cutting a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chatserve.model.attention import CpuAttention
from chatserve.model.decoder import Decoder
from tests.model.checkpoints import FAMILIES, make_checkpoint
from tests.model.oracle import KINDS, Driver, Part, assert_close, load, reference_logits

NUM_TOKENS = 96

ROPE_TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.8,
        "mscale_all_dim": 0.4,
        "beta_fast": 16.0,
        "truncate": False,
    },
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("llama", {"num_key_value_heads": 4}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-wide-heads": ("mistral", {"head_dim": 32}),
    "mistral-window-unused": ("mistral", {"sliding_window": 4096}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3-wide-heads-biases": ("qwen3", {"head_dim": 32, "attention_bias": True}),
    "qwen3-one-kv-head-tied": ("qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-sharded": ("llama", {"max_shard_size": "40KB"}),
    "qwen3-sharded-tied": ("qwen3", {"max_shard_size": "40KB", "tie_word_embeddings": True}),
    "qwen2-stored-in-bf16": ("qwen2", {"dtype": torch.bfloat16}),
}


class Case:
    """One checkpoint: the decoder, a sequence, and transformers' logits for it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.decoder = load(directory)
        self.token_ids = random_ids(NUM_TOKENS, seed=1)
        self.expected = reference_logits(directory, self.token_ids)

    def part(self, base_token: int, start: int, end: int) -> Part:
        return Part(base_token, start, self.token_ids[start:end])


CaseMaker = Callable[..., Case]


def random_ids(num_tokens: int, *, seed: int) -> Tensor:
    return torch.randint(3, 384, (num_tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True, scope="module")
def both_kinds(attention_kind: str) -> Iterator[None]:
    """Every test runs with the C++ attention and with torch's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Driver, "attention_for", KINDS[attention_kind])
        yield


@pytest.fixture(scope="module")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> CaseMaker:
    """Make a case once per module for each name."""
    cases: dict[str, Case] = {}

    def make(name: str, family: str, **overrides: Any) -> Case:
        if name not in cases:
            cases[name] = Case(make_checkpoint(tmp_path_factory.mktemp(name), family, **overrides))
        return cases[name]

    return make


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_equals_transformers_for_every_family_and_rope_type(
    make_case: CaseMaker, family: str, rope_type: str
) -> None:
    """The logits of every token of a whole sequence equal transformers'."""
    case = make_case(f"{family}-{rope_type}", family, rope_parameters=dict(ROPE_TYPES[rope_type]))
    assert_close(Driver(case.decoder).step([case.part(17, 0, NUM_TOKENS)]), case.expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_equals_transformers_for_every_variant(make_case: CaseMaker, variant: str) -> None:
    """Biases, tied embeddings, head shapes, shards and storage types all give transformers' logits."""
    family, overrides = VARIANTS[variant]
    case = make_case(variant, family, **overrides)
    assert_close(Driver(case.decoder).step([case.part(5, 0, NUM_TOKENS)]), case.expected)


@pytest.mark.parametrize("chunk", [1, 2, 7, 31, 95])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill_equals_transformers(make_case: CaseMaker, family: str, chunk: int) -> None:
    """Cutting a sequence into chunks of any size, decode among them, changes no logits."""
    case = make_case(family, family)
    driver = Driver(case.decoder)
    cuts = [*range(0, NUM_TOKENS, chunk), NUM_TOKENS]
    logits = [driver.step([case.part(9, start, end)]) for start, end in pairwise(cuts)]
    assert_close(torch.cat(logits), case.expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_after_prefill_equals_transformers(make_case: CaseMaker, family: str) -> None:
    """One token at a time after a prefill gives the logits of the whole sequence."""
    case = make_case(family, family)
    driver = Driver(case.decoder)
    half = NUM_TOKENS // 2
    logits = [driver.step([case.part(100, 0, half)])]
    logits += [driver.step([case.part(100, token, token + 1)]) for token in range(half, NUM_TOKENS)]
    assert_close(torch.cat(logits), case.expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_sessions_in_one_step_each_equal_transformers(make_case: CaseMaker, family: str) -> None:
    """Decodes and chunks of several sessions at different bases, in one step, do not disturb each other."""
    case = make_case(family, family)
    sequences = {base: random_ids(NUM_TOKENS, seed=base) for base in (0, 131, 260, 384)}
    lengths = {0: 40, 131: 1, 260: 63, 384: 40}
    driver = Driver(case.decoder)
    for base, length in lengths.items():
        driver.step([Part(base, 0, sequences[base][:length])])
    grown = {0: 41, 131: 2, 260: 80, 384: 47}
    logits = driver.step([Part(b, lengths[b], sequences[b][lengths[b] : grown[b]]) for b in lengths])
    sizes = [grown[base] - lengths[base] for base in lengths]
    for base, part in zip(lengths, torch.split(logits, sizes), strict=True):
        expected = reference_logits(case.directory, sequences[base][: grown[base]])
        assert_close(part, expected[lengths[base] :])


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_schedule_of_sessions_gives_the_logits_of_each_alone(make_case: CaseMaker, data: st.DataObject) -> None:
    """However steps cut and mix three sessions, each session's logits are those of its own sequence."""
    case = make_case("llama", "llama")
    driver = Driver(case.decoder)
    done = dict.fromkeys((3, 140, 301), 0)
    logits: dict[int, list[Tensor]] = {base: [] for base in done}
    while any(length < NUM_TOKENS for length in done.values()):
        sizes = {b: data.draw(st.sampled_from([0, 1, 1, 5, 33, NUM_TOKENS]), label=f"tokens of {b}") for b in done}
        parts = [case.part(b, done[b], min(done[b] + sizes[b], NUM_TOKENS)) for b in done]
        parts = [part for part in parts if part.token_ids.shape[0]] or [case.part(b, n, n + 1) for b, n in least(done)]
        outputs = torch.split(driver.step(parts), [part.token_ids.shape[0] for part in parts])
        for part, output in zip(parts, outputs, strict=True):
            logits[part.base_token].append(output)
            done[part.base_token] += part.token_ids.shape[0]
    for pieces in logits.values():
        assert_close(torch.cat(pieces), case.expected)


def least(done: dict[int, int]) -> list[tuple[int, int]]:
    """The session that is furthest behind, so that a step that drew nothing still goes on."""
    return [min(done.items(), key=lambda item: item[1])]


def test_logit_rows_choose_which_tokens_get_logits(make_case: CaseMaker) -> None:
    """Only the rows asked for come back, in the order asked for; none at all is a valid step."""
    case = make_case("llama", "llama")
    chosen = torch.tensor([95, 3, 40])
    assert_close(Driver(case.decoder).step([case.part(0, 0, NUM_TOKENS)], chosen), case.expected[chosen])
    driver = Driver(case.decoder)
    nothing = driver.step([case.part(0, 0, 90)], torch.empty(0, dtype=torch.int64))
    assert nothing.shape == (0, 384)
    assert_close(driver.step([case.part(0, 90, NUM_TOKENS)]), case.expected[90:])


def test_a_step_writes_its_own_rows_only(make_case: CaseMaker) -> None:
    """Every arena row outside the step's tokens still holds the NaN it held before."""
    case = make_case("qwen3", "qwen3")
    driver = Driver(case.decoder)
    driver.step([case.part(50, 0, 20), case.part(200, 0, 1)])
    written = ~driver.arena.isnan().flatten(1).any(dim=1)
    assert written.nonzero().flatten().tolist() == [*range(50, 70), 200]


def test_the_same_step_twice_gives_the_same_bits(make_case: CaseMaker) -> None:
    """Nothing in a step depends on chance or on what the arena held before."""
    case = make_case("mistral", "mistral")
    parts = [case.part(0, 0, 30), case.part(64, 0, 1), case.part(99, 0, 30)]
    first, second = Driver(case.decoder).step(parts), Driver(case.decoder).step(parts)
    assert torch.equal(first, second)


def test_bf16_decoder_is_near_the_fp32_one(make_case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Casting on load works, the arena takes the model's dtype, and logits come back in fp32."""
    case = make_case("llama", "llama")
    monkeypatch.setattr(Driver, "attention_for", CpuAttention)  # which falls back to torch's kernels for bf16
    logits = Driver(load(case.directory, torch.bfloat16)).step([case.part(0, 0, 40), case.part(50, 0, 1)])
    assert logits.dtype == torch.float32
    difference = (logits[:40] - case.expected[:40]).abs().mean() / case.expected[:40].abs().mean()
    assert difference < 0.05


def test_tied_embeddings_are_one_parameter(make_case: CaseMaker) -> None:
    """A tied model holds its embedding once."""
    tied: Decoder = make_case("llama-tied", "llama", tie_word_embeddings=True).decoder
    untied: Decoder = make_case("llama", "llama").decoder
    sizes = [sum(parameter.numel() for parameter in decoder.parameters()) for decoder in (tied, untied)]
    assert tied.lm_head is tied.embedding
    assert sizes[1] - sizes[0] == 384 * 64
