"""The loop: `transformers.Trainer`, counting what a step really learns from."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices

from vltrain.data.encoding import IGNORE_INDEX
from vltrain.data.packing import PackedDataset, Row


@dataclass
class TokenCounts:
    """Tokens since the last log. Tensors stay on their device until they are read."""

    real: int | Tensor = 0
    learned: int | Tensor = 0
    places: int = 0  # real tokens and padding

    def add(self, attention_mask: Tensor | None, labels: Tensor) -> None:
        """Count one batch: int64 [B, L] each. Nothing predicts a row's first token.

        Without a mask, as in packed batches, no place is padding.
        """
        self.real = self.real + (labels.numel() if attention_mask is None else attention_mask.sum())
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


class LengthGroups(Sampler[int]):
    """Samples in random order, but neighbours of about the same length: little padding.

    The order is a function of seed and epoch alone, so a run that resumes goes on with it.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """`lengths` in tokens; `batch_size`: samples between two optimizer steps."""
        self.lengths, self.batch_size, self.seed = list(lengths), batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class RowOrder(Sampler[Row]):
    """The rows of a packed data set, packed and shuffled anew for each epoch.

    Every process computes all of it from seed and epoch, so a run that resumes goes on with it.
    """

    def __init__(self, dataset: PackedDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.dataset.rows(seed=self.seed, epoch=self.epoch))


class Trainer(transformers.Trainer):
    """`transformers.Trainer` whose logs tell tokens a second, learned tokens and padding."""

    def __init__(
        self, *args: Any, eval_collator: Callable[..., dict[str, Any]] | None = None, **kwargs: Any
    ) -> None:
        """As `transformers.Trainer`; `eval_collator` makes the batches of evaluation where they
        are not made as those of training are."""
        super().__init__(*args, **kwargs)
        self._eval_collator = eval_collator or self.data_collator
        self._counts = TokenCounts()
        self._counted_since = time.perf_counter()

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        self._counts.add(inputs.get("attention_mask"), inputs["labels"])
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if isinstance(dataset, PackedDataset):
            return RowOrder(dataset, seed)
        grouped = self.args.train_sampling_strategy == "group_by_length"
        if not grouped or not hasattr(dataset, "lengths"):
            return super()._get_train_sampler(train_dataset)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroups(dataset.lengths, step, seed)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        of_training = self.data_collator
        self.data_collator = self._eval_collator  # the loader takes the collator of this moment
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = of_training

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

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """An adapter is saved as it is: `peft` would look at its base, on the hub even, first."""
        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            self.model.save_pretrained(
                str(folder), state_dict=state_dict, save_embedding_layers=False
            )
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """A run cut off behind its last step has nothing left: `transformers` takes one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._counted_since = time.perf_counter()  # passing over old batches is no training


def compute_precision(dtype: torch.dtype) -> dict[str, bool]:
    """The Trainer's switches for weights of a dtype: learned weights are float32 beside them."""
    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
