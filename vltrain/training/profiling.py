"""Measured seconds and bytes of a few real training steps."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from vltrain.data.mixing import Mix
from vltrain.models.layer_runs import LayerRuns
from vltrain.training.step_batches import ROWS
from vltrain.training.trainer import TokenCounts, Trainer


class StepClock(TrainerCallback):
    """Wall-clock seconds of each optimizer step, from its first forward on."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        _synchronize()
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        _synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class DataClock(Trainer):
    """A Trainer that notes how long it waits for each optimizer step's data, and how much it is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waited: list[float] = []  # seconds
        self.taken: list[TokenCounts] = []

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = super().get_batch_samples(*args, **kwargs)
        self.waited.append(time.perf_counter() - began)
        counts = TokenCounts()
        for batch in found[0]:
            for row in batch.get(ROWS, [batch]):
                counts.add(row.get("attention_mask"), row["labels"])
        self.taken.append(counts)
        return found


@dataclass(frozen=True)
class Measured:
    """What steps of training took."""

    seconds: tuple[float, ...]  # of each optimizer step, its data there
    waited: tuple[float, ...]  # for the data of each: to be read, put together and sent off
    tokens: tuple[int, ...]  # of each, padding left out
    learned: tuple[int, ...]  # tokens of each
    peak_bytes: int | None  # that torch had allocated at most; None without a GPU
    reserved_bytes: int | None  # that its allocator held of the GPU at most
    context_bytes: int | None  # that the GPU has used beside the allocator's, in the end

    def seconds_per_step(self, warmup: int) -> float:
        """The data waited for, without the first `warmup` steps: the median; the mean where steps
        are not of the same number of tokens."""
        whole = [sum(one) for one in zip(self.seconds, self.waited, strict=True)]
        alike = len({*self.tokens[warmup:]}) == 1
        return (statistics.median if alike else statistics.mean)(whole[warmup:])

    def waiting_share(self, warmup: int) -> float:
        """Of the time of all steps but the first `warmup`, the share that data was waited for."""
        waited = sum(self.waited[warmup:])
        return waited / (sum(self.seconds[warmup:]) + waited)


def measure(
    model: PreTrainedModel | PeftModel,
    arguments: TrainingArguments,
    dataset: Dataset,
    collator: Callable[..., dict[str, Any]],
    mix: Mix | None = None,
    layers: LayerRuns | None = None,
    optimizer: tuple[type, dict[str, Any]] | None = None,
) -> Measured:
    """Train as `arguments` say, and return what it took.

    The peak counts from here on, so what making the model took besides does not show.

    Args:
        arguments: with as many `max_steps` as are to be measured, and nothing to be saved.
        mix: what an epoch shows of `dataset`; None: each sample once.
        layers: how the model's layers are run; None: as `arguments` have it.
        optimizer: its class and settings; None: the one that `arguments` name.
    """
    clock = StepClock()
    trainer = DataClock(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        mix=mix,
        layers=layers,
        optimizer_cls_and_kwargs=optimizer,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    on_gpu = arguments.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    steps = len(clock.seconds)
    of_steps = (
        tuple(clock.seconds),
        tuple(trainer.waited[:steps]),
        tuple(int(counts.real) for counts in trainer.taken[:steps]),
        tuple(int(counts.learned) for counts in trainer.taken[:steps]),
    )
    if not on_gpu:
        return Measured(*of_steps, None, None, None)
    free, whole = torch.cuda.mem_get_info()
    return Measured(
        *of_steps,
        torch.cuda.max_memory_allocated(),
        torch.cuda.max_memory_reserved(),
        whole - free - torch.cuda.memory_reserved(),
    )
