"""Measured seconds and bytes of a few real training steps."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from vltrain.data.mixing import Mix
from vltrain.models.layer_runs import LayerRuns
from vltrain.training.look_ahead import Batches
from vltrain.training.step_batches import ROWS
from vltrain.training.trainer import TokenCounts, Trainer


class StepClock(TrainerCallback):
    """Wall-clock seconds of each optimizer step, from the end of the one before to its own."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        _synchronize()
        self.last_end = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        _synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last_end)
        self.last_end = now


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Wait:
    """A stretch of time in which the device had nothing to do, or the process where it computes."""

    def __init__(self) -> None:
        """It begins where the device has done all that it was asked before."""
        self._began = _moment()

    def end(self) -> "Wait":
        """It ends here, or did not last where the device is still at work."""
        self._ended = _moment()
        return self

    @property
    def seconds(self) -> float:
        """How long it was; the device must have come to its end."""
        if isinstance(self._began, float):
            return self._ended - self._began
        return self._began.elapsed_time(self._ended) / 1000


def _moment() -> Any:
    """Now, by the clock or on a GPU's own queue."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class DataClock(Trainer):
    """A Trainer that notes how long each optimizer step waits for data, and how much it takes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waits: list[tuple[int, Wait]] = []  # in which step
        self.taken: list[TokenCounts] = []

    def read_batches(self, *args: Any, **kwargs: Any) -> Batches:
        wait = Wait()
        batches = super().read_batches(*args, **kwargs)
        self.waits.append((self.state.global_step, wait.end()))
        return batches

    def count_step(
        self, batches: Batches, device: torch.device
    ) -> tuple[Batches, Tensor | int | None]:
        counts = TokenCounts()
        for batch in batches:
            for row in batch.get(ROWS, [batch]):
                counts.add(row.get("attention_mask"), row["labels"])
        self.taken.append(counts)
        return super().count_step(batches, device)

    def _is_last_step(self) -> bool:
        """The run's last step reads ahead like the others: each is measured with its reading."""
        return self._at_end or self.accelerator.gradient_state.end_of_dataloader

    def waited(self, step: int) -> float:
        """Seconds in a step, by its number from 0."""
        return sum(wait.seconds for number, wait in self.waits if number == step)


@dataclass(frozen=True)
class Measured:
    """What steps of training took."""

    seconds: tuple[float, ...]  # of each optimizer step, with what it waited for data
    waited: tuple[float, ...]  # for data, in each: the device had nothing to do
    tokens: tuple[int, ...]  # of each, padding left out
    learned: tuple[int, ...]  # tokens of each
    peak_bytes: int | None  # that torch had allocated at most; None without a GPU
    reserved_bytes: int | None  # that its allocator held of the GPU at most
    context_bytes: int | None  # that the GPU has used beside the allocator's, in the end

    def seconds_per_step(self, warmup: int) -> float:
        """Without the first `warmup` steps: the median; the mean where steps are not of the same
        number of tokens."""
        alike = len({*self.tokens[warmup:]}) == 1
        return (statistics.median if alike else statistics.mean)(self.seconds[warmup:])

    def waiting_share(self, warmup: int) -> float:
        """Of the time of all steps but the first `warmup`, the share that data was waited for."""
        return sum(self.waited[warmup:]) / sum(self.seconds[warmup:])


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
        dataset: a step more of it is read where an epoch has one.
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
        tuple(trainer.waited(step) for step in range(steps)),
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
