"""A `transformers.Trainer` of which a kill, a full disk or a NaN loses nothing."""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from vltrain.errors import Stopped, VltrainError
from vltrain.training.agreement import any_process, from_all
from vltrain.training.checkpoints import SHELF, publish, rotate
from vltrain.training.files import is_disk_full
from vltrain.training.finiteness import (
    RECORDS,
    NamedBatches,
    StepWatch,
    listed,
    not_finite_error,
)
from vltrain.training.look_ahead import LookingAhead
from vltrain.training.processes import wait_for_all
from vltrain.training.stopping import LeaveSignals

logger = logging.getLogger(__name__)


class ResumableTrainer(LookingAhead):
    """Checkpoints appear whole; a stop, or a loss that is not finite, is every process's decision.

    What a resumed run computes is to the bit what it would have computed uninterrupted: beside
    what `transformers` saves, the loss since the last log is, and evaluation draws no random
    number that training would have drawn.
    """

    def __init__(
        self,
        *args: Any,
        stop_requested: Callable[[], bool] = bool,
        stop_after_nonfinite: int = 1,
        **kwargs: Any,
    ) -> None:
        """As `transformers.Trainer`, and two things beside.

        Args:
            stop_requested: asked in each step whether this process is to stop.
            stop_after_nonfinite: how many steps in a row may be without a finite loss.
        """
        super().__init__(*args, **kwargs)
        self.data_collator = NamedBatches(self.data_collator)
        self._stop_requested = stop_requested
        self._watch = StepWatch(stop_after_nonfinite)
        self._stopping = False
        self._saved_step = -1  # the step of the last checkpoint that was written
        self._evaluated_step = -1
        self._shelf: Path | None = None  # where a checkpoint is being written

    # --- one step ---

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        records = inputs.get(RECORDS, ())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._watch.saw(records, loss)
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch on its device, without what is no model's to see."""
        return super()._prepare_inputs({k: v for k, v in inputs.items() if k != RECORDS})

    def _get_grad_norm(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor | float | None:
        """The last that is done before the optimizer moves: where a bad step can be left out."""
        norm = super()._get_grad_norm(model, *args, **kwargs)
        # The scaling of losses in fp16 overflows now and then, and skips such steps by itself.
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        bad = self._watch.is_bad(None if self.args.fp16 else whole)
        flags = any_process([self._stop_requested(), bad], self.args.device)
        self._stopping, bad = flags
        if bad:
            self._leave_out(model)
        self._watch.step_done(bad=bad)
        return norm

    def _is_last_step(self) -> bool:
        """Where a stop is asked for, nothing is read that no step will learn from."""
        return self._stop_requested() or super()._is_last_step()

    def _leave_out(self, model: nn.Module) -> None:
        """Take no update of a gradient that is not finite: every weight would become NaN.

        Raises:
            NotFiniteError: there were enough of them in a row, or the engine has taken the
                update already, as DeepSpeed does within the backward pass.
        """
        records = from_all(self._watch.suspects())
        step, in_a_row = self.state.global_step + 1, self._watch.in_a_row + 1
        engine_steps = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if in_a_row >= self._watch.stop_after or engine_steps:
            raise not_finite_error(step, in_a_row, records)
        if self.is_world_process_zero():
            logger.warning(
                "step %d is left out, its loss or gradient is NaN or infinite: %s",
                step,
                listed(records),
            )
        if not self.args.fp16:  # whose scaler leaves it out, and wants to see the gradient
            model.zero_grad()

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Tensor | float | None, *args: Any, **kwargs: Any
    ) -> None:
        """What the end of an epoch calls for comes before a checkpoint of its last step.

        `transformers` saves first, and a kill between the two would lose an evaluation.
        """
        control = self.control
        control.should_save |= self._stopping
        if control.should_save and self._is_at_an_epochs_end():
            control.should_log |= self.args.logging_strategy == IntervalStrategy.EPOCH
            control.should_evaluate |= self.args.eval_strategy == IntervalStrategy.EPOCH
        control.should_evaluate &= self._evaluated_step != self.state.global_step
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        if self._globalstep_last_logged == self.state.global_step:
            tr_loss.zero_()  # a NaN outlives being subtracted from itself
        if self._stopping:
            self._stop()

    def _is_at_an_epochs_end(self) -> bool:
        return self.state.global_step >= self.state.max_steps or self.state.epoch % 1 == 0

    def _stop(self) -> None:
        """Raise Stopped: the step is finished, and its checkpoint written."""
        raise Stopped(
            f"stopped after step {self.state.global_step} of {self.state.max_steps}, saved in "
            f"{self._checkpoint_place()}\n  to go on: give the same command again"
        )

    # --- checkpoints ---

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints are written; while one is, the folder that it is finished in."""
        return super()._get_output_dir(trial) if self._shelf is None else str(self._shelf)

    def _checkpoint_place(self) -> Path:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        return Path(self.args.output_dir) / name

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, then give it its name and delete surplus ones.

        Raises:
            VltrainError: the disk is full; the checkpoints of before are left as they are.
        """
        if self._saved_step == self.state.global_step:
            return
        place = self._checkpoint_place()
        shelf = place.parent / SHELF
        if self.args.should_save:
            shutil.rmtree(shelf, ignore_errors=True)
        wait_for_all()
        self._shelf = shelf
        try:
            super()._save_checkpoint(model, trial)
            wait_for_all()
            self._name_best(shelf / place.name, place)
            if self.args.should_save:
                publish(shelf / place.name, place)
                shelf.rmdir()
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_disk_full(error):
                raise
            shutil.rmtree(shelf, ignore_errors=True)
            raise _disk_full_error(place, error) from error
        finally:
            self._shelf = None
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            limit = self.args.save_total_limit
            rotate(place, keep=limit, best=None if best is None else Path(best))
        wait_for_all()
        self._saved_step = self.state.global_step

    def _name_best(self, draft: Path, place: Path) -> None:
        """Say in the state where the best checkpoint will be, if it is this one."""
        if self.state.best_model_checkpoint == str(draft):
            self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(draft / TRAINER_STATE_NAME))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        text = json.dumps(self._since_last_log())
        self._unlogged_file(output_dir).write_text(text + "\n", encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self._unlogged_file(checkpoint).is_file():
            text = self._unlogged_file(checkpoint).read_text(encoding="utf-8")
            self._restore_since_last_log(json.loads(text))

    def _unlogged_file(self, checkpoint: str) -> Path:
        """What this process had not logged when it saved; of as many processes alone."""
        name = f"unlogged_{self.args.process_index}_of_{self.args.world_size}.json"
        return Path(checkpoint) / name

    def _since_last_log(self) -> dict[str, Any]:
        """What the next log will be made of, with what was computed before the checkpoint."""
        return {"loss": self._tr_loss.item(), "last_logged_step": self._globalstep_last_logged}

    def _restore_since_last_log(self, values: dict[str, Any]) -> None:
        self._tr_loss.fill_(values["loss"])
        self._globalstep_last_logged = values["last_logged_step"]

    # --- data and evaluation ---

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        # accelerate's loader hands what it has not itself on to the one that it wraps.
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = LeaveSignals(inner.worker_init_fn)
        return loader

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `transformers` does, leaving the random state as it was."""
        with torch.random.fork_rng(devices=[]):
            metrics = super().evaluate(*args, **kwargs)
        self._evaluated_step = self.state.global_step
        return metrics


def _disk_full_error(place: Path, error: Exception) -> VltrainError:
    free = "an unknown amount"
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(place.parent).free / 2**30:.1f} GiB"
    return VltrainError.at(
        str(place),
        what=f"the checkpoint cannot be written, the disk is full ({free} free): {error}",
        fix="make space, or lower trainer.save_total_limit; the checkpoints of before are whole, "
        "and the same command goes on from the last of them",
    )
