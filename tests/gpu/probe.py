"""An engine on the GPU whose logits can be looked at, and transformers' bf16 logits for the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from chatserve.engine.build import build
from chatserve.engine.config import EngineConfig
from chatserve.engine.runner import TorchRunner
from tests.engine.fakes import run_until_idle, submit, tokens_of

TOLERANCE = 2e-2  # relative L2 distance of two bf16 computations
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 2},
    "qwen3": {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 4},
    "qwen2": {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
}
COMMON = {
    "hidden_size": 512, "initializer_range": 0.03, "intermediate_size": 1024, "num_hidden_layers": 4,
    "max_position_embeddings": 8192, "dtype": torch.bfloat16,
}  # fmt: skip


class ProbedEngine:
    """An engine core on `directory`'s model. `logits[request_id]` [position]: what token `position` was chosen from."""

    def __init__(self, directory: Path, **config: Any) -> None:
        fields = {"kv_device_bytes": 1 << 30, "max_step_tokens": 512, "max_running": 16} | config
        self.core, self.info = build(EngineConfig(model=str(directory), device="cuda", **fields))
        self.logits: dict[str, dict[int, torch.Tensor]] = {}
        runner: Any = self.core._runner
        if isinstance(runner, TorchRunner):
            self._record_launches(runner)
        else:
            self._record_draws(runner)

    def _record_draws(self, runner: Any) -> None:
        draw = runner._draw

        def recording_draw(sampling: Sequence[Any], rows: list[int], logits: torch.Tensor) -> None:
            self._record(sampling, [logits[row].clone() for row in rows])
            draw(sampling, rows, logits)

        runner._draw = recording_draw

    def _record_launches(self, runner: Any) -> None:
        decoder, launch, computed = runner._decoder, runner.launch, []

        def recording_launch(work: Sequence[Any]) -> Any:
            step = launch(work)
            self._record([item for item in work if item.samples], computed.pop())
            return step

        def recording_decoder(*arguments: Any) -> torch.Tensor:
            computed.append(decoder(*arguments))
            return computed[-1]

        runner._decoder, runner.launch = recording_decoder, recording_launch

    def _record(self, sampling: Sequence[Any], logits: Iterable[torch.Tensor]) -> None:
        for item, row in zip(sampling, logits, strict=True):
            self.logits.setdefault(item.request.request_id, {})[item.end] = row.float()

    def reply(self, request_id: str, session_id: str, token_ids: Sequence[int], num_tokens: int, **fields: Any) -> Any:
        """Run one request alone; its generated ids."""
        submit(self.core, request_id, session_id, token_ids, max_output_tokens=num_tokens, **fields)
        return tokens_of(run_until_idle(self.core, check=False)[request_id])

    def close(self) -> None:
        """Give the GPU's memory back."""
        self.core.store.close()
        torch.cuda.empty_cache()


def reference_logits(directory: Path, token_ids: Sequence[int]) -> torch.Tensor:
    """Transformers' bf16 logits [n, vocab] as float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, local_files_only=True).cuda()
    with torch.inference_mode():
        return model(torch.tensor([list(token_ids)], device="cuda")).logits[0].float()


def assert_same_answer(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Close by L2, and the same best token wherever rounding cannot decide it."""
    error = ((logits - expected).norm() / expected.norm()).item()
    assert error < TOLERANCE, f"relative error {error:.2e}"
    best = expected.topk(2).values
    if best[0] - best[1] > 4 * (logits - expected).abs().max():
        assert logits.argmax() == expected.argmax()
