"""What a run shows while it goes, and what it writes down."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vltrain.training.host_time import learned_by

PLAIN_LINE_SECONDS = 10.0  # between lines where there is no terminal to draw a bar in

SUMMARY_KEYS = ("train_runtime", "train_loss", "total_flos")  # the Trainer's last words


class MetricsLog(TrainerCallback):
    """One object for each logged step, given to `write` as the Trainer made it."""

    def __init__(self, write: Callable[[Mapping[str, Any]], None]) -> None:
        self.write = write

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any],
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and not any(key in logs for key in SUMMARY_KEYS):
            self.write({"step": state.global_step, **logs})


class WholeGradients(TrainerCallback):
    """A gradient of zero for what learns and no sample of a step has touched.

    So a step without pictures moves the projector by what its optimizer remembers, in one process
    as under the engines that put all gradients into one buffer. A step without any gradient is one
    that is left out, and stays so.
    """

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **_: Any,
    ) -> None:
        learned = learned_by(optimizer)
        if all(parameter.grad is None for parameter in learned):
            return
        for parameter in learned:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


class ProgressBar(TrainerCallback):
    """A bar with loss, learning rate, tokens a second and time left; plain lines without one."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.last_line = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.task = self.bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, figures=""
        )
        self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any],
        **_: Any,
    ) -> None:
        if "eval_loss" in logs:
            self.console.print(f"step {state.global_step}: eval loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        figures = (
            f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  "
            f"{logs.get('tokens_per_second', 0.0):,.0f} tokens/s"
        )
        self.bar.update(self.task, figures=figures)
        now = time.monotonic()
        due = now - self.last_line >= PLAIN_LINE_SECONDS or state.global_step == state.max_steps
        if not self.console.is_terminal and due:
            self.last_line = now
            self.console.print(f"step {state.global_step}/{state.max_steps}  {figures}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.stop()
