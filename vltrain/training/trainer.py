"""The loop: `transformers.Trainer`, counting what a step really learns from."""

import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

IGNORE_INDEX = -100


@dataclass
class TokenCounts:
    """Tokens since the last log. Tensors stay on their device until they are read."""

    real: int | Tensor = 0
    learned: int | Tensor = 0
    places: int = 0  # real tokens and padding

    def add(self, attention_mask: Tensor, labels: Tensor) -> None:
        """Count one batch: int64 [B, L] each. Nothing predicts a row's first token."""
        self.real = self.real + attention_mask.sum()
        self.learned = self.learned + (labels[:, 1:] != IGNORE_INDEX).sum()
        self.places += labels.numel()

    def summary(self, seconds: float) -> dict[str, float | int]:
        """What a line of metrics.jsonl says of them."""
        real = int(self.real)
        return {
            "tokens_per_second": real / seconds,
            "learned_tokens": int(self.learned),
            "padding_share": 1 - real / self.places,
        }


class Trainer(transformers.Trainer):
    """`transformers.Trainer` whose logs tell tokens a second, learned tokens and padding."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counts = TokenCounts()
        self._counted_since = time.perf_counter()

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        self._counts.add(inputs["attention_mask"], inputs["labels"])
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._counts.places:
            now = time.perf_counter()
            logs |= self._counts.summary(now - self._counted_since)
            self._counts = TokenCounts()
            self._counted_since = now
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        started = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self._counted_since += time.perf_counter() - started  # no training step ran meanwhile
        return metrics

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._counted_since = (
            time.perf_counter()
        )  # skipping the batches already seen is no training


def compute_precision(dtype: torch.dtype) -> dict[str, bool]:
    """The Trainer's switches for weights of a dtype: learned weights are float32 beside them."""
    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
