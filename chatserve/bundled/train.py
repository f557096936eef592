"""Trains the bundled model from nothing: `python -m chatserve.bundled.train --out DIR --steps N --seed S`.

Processes generate conversations, batch `b` from the seed and `b` alone, so that a run with `--steps` repeats up to the
order of floating-point sums; `--minutes` ends by the clock instead. Rows are whole conversations from position 0, short
ones first, then mostly longer than the context. Only replies are learnt. Writes a Hugging Face directory in float16.
"""

import argparse
import os
import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (PyTorch's own name for it)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from chatserve.bundled import CONTEXT_TOKENS
from chatserve.bundled.data import conversation
from chatserve.bundled.tokenizer import END, PAD, Encoder, save_tokenizer, train_tokenizer

SHORT_TOKENS = 512
LONG_TOKENS = CONTEXT_TOKENS + 1024
SHORT_STEPS = 500
SHORT_SHARE = 0.2
CHARS_PER_TOKEN = 2.05
WARMUP = 0.02
PATIENCE_S = 120
MASTER = "master.safetensors"
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Options:
    """What a run is; with the same values it gives the same model."""

    out: Path
    seed: int
    steps: int
    minutes: float
    workers: int
    batch_tokens: int
    learning_rate: float
    weight_decay: float
    device: str
    compiled: bool
    resume: Path | None

    def progress(self, step: int, started: float) -> float:
        """How much of the run is over, from 0 to 1."""
        by_clock = (time.monotonic() - started) / (60 * self.minutes) if self.minutes else 0.0
        return max(by_clock, step / self.steps if self.steps else 0.0)


def model_config(vocabulary: int, end_id: int, pad_id: int) -> LlamaConfig:
    """A plain Llama of 3.6 million parameters whose cache row is 1,536 numbers a token."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT_TOKENS,
        rope_theta=500000.0,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )


# Data


def row_tokens(seed: int, index: int) -> int:
    """How long the rows of a batch are."""
    short = index < SHORT_STEPS or random.Random(f"length/{seed}/{index}").random() < SHORT_SHARE
    return SHORT_TOKENS if short else LONG_TOKENS


def make_row(encoder: Encoder, rng: random.Random, tokens: int) -> tuple[list[int], list[tuple[int, int]]]:
    """One conversation cut to so many tokens, and where its replies are."""
    ids, replies = encoder.encode(conversation(rng, int(tokens * CHARS_PER_TOKEN)).messages)
    padded = ids + [0] * (tokens - len(ids))
    return padded[:tokens], [(begin, min(end, tokens)) for begin, end in replies if begin < tokens]


def make_batch(encoder: Encoder, seed: int, index: int, batch_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and the flat positions whose next id is to be learnt."""
    tokens = row_tokens(seed, index)
    rows, positions = [], []
    for i in range(max(1, batch_tokens // tokens)):
        ids, replies = make_row(encoder, random.Random(f"row/{seed}/{index}/{i}"), tokens)
        rows.append(ids)
        positions += [i * tokens + at - 1 for begin, end in replies for at in range(begin, end)]
    return np.array(rows, dtype=np.int16), np.array(positions, dtype=np.int32)


def work(queue: "Queue[Any]", tokenizer_dir: str, seed: int, first: int, stride: int, batch_tokens: int) -> None:
    """A process: makes every `stride`-th batch for ever."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = Encoder(AutoTokenizer.from_pretrained(tokenizer_dir))
    index = first
    while True:
        queue.put(make_batch(encoder, seed, index, batch_tokens))
        index += stride


def batches(options: Options) -> Iterator[Batch]:
    """Batches in order, on the device."""
    context = get_context("spawn")
    queues: list[Queue[Any]] = [context.Queue(maxsize=4) for _ in range(options.workers)]
    for first, queue in enumerate(queues, SHORT_STEPS if options.resume else 0):
        arguments = (queue, str(options.out), options.seed, first, options.workers, options.batch_tokens)
        context.Process(target=work, args=arguments, daemon=True).start()
    step = 0
    while True:
        ids, positions = queues[step % len(queues)].get(timeout=PATIENCE_S)
        yield on_device(ids, positions, options.device)
        step += 1


def on_device(ids: np.ndarray, positions: np.ndarray, device: str) -> Batch:
    """Ids, positions to learn at, and what comes next there."""
    flat = torch.from_numpy(ids.reshape(-1).astype(np.int64))
    at = torch.from_numpy(positions.astype(np.int64))
    tensors = (flat.view(ids.shape), at, flat[at + 1])
    if device == "cuda":
        tensors = (tensors[0].pin_memory(), tensors[1].pin_memory(), tensors[2].pin_memory())
    return (
        tensors[0].to(device, non_blocking=True),
        tensors[1].to(device, non_blocking=True),
        tensors[2].to(device, non_blocking=True),
    )


# Optimisation


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for matrices; those of one shape are stepped together.

    The Newton-Schulz coefficients are Keller Jordan's; the factor gives the update AdamW's usual size.
    """

    def __init__(
        self, matrices: list[torch.nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([{"params": same} for same in by_shape.values()], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever given
        """One update of every group of equal matrices."""
        for group in self.param_groups:
            params = group["params"]
            gradient = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            momentum = state.setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 1 - group["momentum"])
            update = orthogonal(gradient.lerp(momentum, group["momentum"]))
            size = 0.2 * max(gradient.shape[1:]) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.to(gradient.dtype).unbind()), alpha=-group["lr"] * size)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices, roughly, by five Newton-Schulz steps."""
    x: torch.Tensor = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: torch.Tensor = x.mT if tall else x
    return result


def optimizers(model: LlamaForCausalLM, options: Options) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for the embedding and the gains."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    embeddings = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" in name]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": embeddings}, {"params": gains, "weight_decay": 0.0}]
    lr, decay = options.learning_rate, options.weight_decay
    adamw = torch.optim.AdamW(groups, lr=lr, weight_decay=decay, betas=(0.9, 0.95), fused=options.device == "cuda")
    return [Muon(inner, lr, decay), adamw]


def rate(progress: float) -> float:
    """The learning rate's factor: a short climb, then straight down to nothing."""
    return min(progress / WARMUP, 1.0) * max(0.0, 1.0 - progress) if progress > 0 else 0.01


def precision(device: str) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", dtype=torch.bfloat16) if device == "cuda" else nullcontext()


class Trainer:
    """A model, its optimizers and one step of learning."""

    def __init__(self, model: LlamaForCausalLM, options: Options) -> None:
        self.options = options
        self.model = model
        self.forward = torch.compile(model.model, dynamic=False) if options.compiled else model.model
        self.optimizers = optimizers(model, options)

    def step(self, batch: Batch, progress: float) -> torch.Tensor:
        """Learns from one batch; gives the loss before it."""
        ids, positions, targets = batch
        with precision(self.options.device):
            hidden = self.forward(input_ids=ids, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden.flatten(0, 1)[positions])
        loss = F.cross_entropy(logits.float(), targets)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.options.learning_rate * rate(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()


# The run


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """The model in float16, and its full-precision weights beside it for `--resume`."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file({name: value.contiguous() for name, value in state.items()}, out / MASTER)
    half = LlamaForCausalLM(model.config).half()
    half.load_state_dict(state, strict=False)
    half.tie_weights()
    half.save_pretrained(str(out))


def start(options: Options) -> LlamaForCausalLM:
    """A fresh model, or the one to resume, with its tokenizer saved in `out`."""
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.resume) if options.resume else train_tokenizer(options.seed)
    save_tokenizer(tokenizer, options.out)
    end_id, pad_id = tokenizer.convert_tokens_to_ids([END, PAD])
    model = LlamaForCausalLM(model_config(len(tokenizer), end_id, pad_id))
    model.generation_config.update(do_sample=False, eos_token_id=end_id, pad_token_id=pad_id, bos_token_id=None)
    if options.resume:
        model.load_state_dict(load_file(options.resume / MASTER), strict=False)
        model.tie_weights()
    return model.to(options.device)


def train(options: Options) -> None:
    """Trains, prints the loss now and then, and saves at the end."""
    model = start(options)
    trainer = Trainer(model, options)
    source = batches(options)
    batch = next(source)
    started, shown, tokens, step = time.monotonic(), time.monotonic(), 0, 0
    while (progress := options.progress(step, started)) < 1.0:
        loss = trainer.step(batch, progress)
        tokens += batch[0].numel()
        step += 1
        batch = next(source)
        if time.monotonic() - shown > 10 or step == 1:
            shown = time.monotonic()
            print(
                f"step {step}  {progress:5.1%}  loss {loss.item():.4f}  {tokens / (shown - started) / 1e3:.0f} ktok/s",
                flush=True,
            )
    save_model(model, options.out)
    seconds = time.monotonic() - started
    print(f"{step} steps, {tokens / 1e6:.0f} million tokens, {seconds:.0f} s, last loss {loss.item():.4f}")


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="length of the run in steps")
    parser.add_argument("--minutes", type=float, default=0.0, help="length of the run by the clock")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--batch-tokens", type=int, default=131072)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--resume", type=Path, help="a directory of an earlier run to go on from")
    a = parser.parse_args()
    if not a.steps and not a.minutes:
        parser.error("give --steps or --minutes")
    return Options(
        out=a.out,
        seed=a.seed,
        steps=a.steps,
        minutes=a.minutes,
        workers=a.workers,
        batch_tokens=a.batch_tokens,
        learning_rate=a.learning_rate,
        weight_decay=a.weight_decay,
        device=a.device,
        compiled=a.device == "cuda" and not a.no_compile,
        resume=a.resume,
    )


if __name__ == "__main__":
    train(parse())
