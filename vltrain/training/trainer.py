"""The loop: `transformers.Trainer`, counting what a step really learns from."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput

from vltrain.data.dataset import DROPPED, SampleDataset
from vltrain.data.encoding import IGNORE_INDEX
from vltrain.data.mixing import Mix
from vltrain.data.packing import PackedDataset
from vltrain.data.step_rows import StepRows
from vltrain.data.streaming import SampleStream
from vltrain.models.adapters import let_go_of_originals, saved_parameters
from vltrain.models.layer_runs import LayerRuns, arrange_layers
from vltrain.models.learned_vocabulary import add_in_place
from vltrain.models.shares import whole_tensors
from vltrain.training.callbacks import WholeGradients
from vltrain.training.engines import NO_ENGINE, Engine, fsdp2_precision, refuse_other_engine
from vltrain.training.epoch_order import EpochOrder, row_order, sample_order, step_order
from vltrain.training.held_out import HeldOutShare, LossSum
from vltrain.training.host_time import learned_by, shorten_steps
from vltrain.training.learning_rates import split_groups
from vltrain.training.look_ahead import Batches
from vltrain.training.master_adamw import masters_of, narrow_learned
from vltrain.training.resumable import ResumableTrainer
from vltrain.training.step_batches import ROWS, StepBatches, in_turn
from vltrain.training.stopping import LeaveSignals
from vltrain.training.universal import drop_shares, part_groups, share_count, shared_out_anew
from vltrain.training.zero3_layers import gather_by_layers

logger = logging.getLogger(__name__)


@dataclass
class TokenCounts:
    """Tokens since the last log. Tensors stay on their device until they are read."""

    real: int | Tensor = 0
    learned: int | Tensor = 0
    places: int = 0  # real tokens and padding
    dropped: int = 0  # samples that could not be shown

    def add(self, attention_mask: Tensor | None, labels: Tensor) -> None:
        """Count one batch: int64 [B, L] each. Nothing predicts a row's first token.

        Without a mask, as in packed batches, no place is padding.
        """
        self.real = self.real + (labels.numel() if attention_mask is None else attention_mask.sum())
        self.learned = self.learned + (labels[:, 1:] != IGNORE_INDEX).sum()
        self.places += labels.numel()

    def of_all(self, accelerator: Accelerator) -> "TokenCounts":
        """The counts of all processes of the run together; every one of them asks."""
        own = [int(self.real), int(self.learned), self.places, self.dropped]
        counts = accelerator.reduce(torch.tensor(own, device=accelerator.device))
        return TokenCounts(*counts.tolist())

    def summary(self, seconds: float) -> dict[str, float | int]:
        """What a line of metrics.jsonl says of them."""
        real = int(self.real)
        figures = {
            "tokens_per_second": real / seconds,
            "learned_tokens": int(self.learned),
            "padding_share": 1 - real / self.places,
        }
        return figures | ({"dropped_samples": self.dropped} if self.dropped else {})


class Trainer(ResumableTrainer):
    """`transformers.Trainer` on orders of our own: mixed, packed, streamed, step by step.

    Its logs tell tokens a second, learned tokens and padding; its eval loss is a mean over tokens.
    """

    def __init__(
        self,
        *args: Any,
        mix: Mix | None = None,
        eval_collator: Callable[..., dict[str, Any]] | None = None,
        engine: Engine = NO_ENGINE,
        rate: Callable[[str], float] | None = None,
        layers: LayerRuns | None = None,
        **kwargs: Any,
    ) -> None:
        """As `ResumableTrainer`, and five things more.

        Args:
            mix: which of the samples an epoch shows; None: each once.
            eval_collator: makes the batches of evaluation where they are not made as those of
                training are.
            engine: what the model must run under when training begins.
            rate: the learning rate of a parameter, by its name; None: the same for all.
            layers: how the model's layers are run; None: as the arguments have it.
        """
        super().__init__(*args, **kwargs)
        if layers is not None:
            arrange_layers(self.model, layers)
            if engine.zero_stage == 3:
                gather_by_layers(self.model)
        self._mix = mix
        self._engine = engine
        self._rate = rate
        if engine.leaves_model_as_it_is:
            self.add_callback(WholeGradients())
        self._token_flops: int | None = None  # not asked for yet
        if self.is_fsdp_enabled and self.args.bf16:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy = fsdp2_precision(torch.bfloat16)
        self._eval_collator = eval_collator or self.data_collator
        if isinstance(self.train_dataset, StepRows):
            self.data_collator = StepBatches(self.data_collator)
        self._order: EpochOrder | None = None  # of the samples or rows; None: not known yet
        self._counts = TokenCounts()
        self._counted_since = time.perf_counter()
        self._told: set[str] = set()  # why samples were dropped
        self._held_out = LossSum()  # of the evaluation that is going on
        self._widened = False  # whether the optimizer's masters have taken the weights' place

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of one batch, gone back through; of a step that comes whole, the sum of all."""
        if ROWS not in inputs:
            return self._batch_step(model, inputs, num_items_in_batch)
        losses = []
        for batch, context in in_turn(self.accelerator, model, inputs[ROWS]):
            with context:
                losses.append(self._batch_step(model, batch, num_items_in_batch))
        return torch.stack(losses).sum()

    def _batch_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        self._counts.add(inputs.get("attention_mask"), inputs["labels"])
        self._note_dropped(inputs.pop(DROPPED, ()))
        return super().training_step(model, inputs, num_items_in_batch)

    def _note_dropped(self, reasons: Sequence[str]) -> None:
        """Count samples that could not be shown, and say each reason once."""
        self._counts.dropped += len(reasons)
        for reason in reasons:
            if reason not in self._told:
                self._told.add(reason)
                logger.warning("a sample is dropped: %s", reason)

    def count_step(
        self, batches: Batches, device: torch.device
    ) -> tuple[Batches, Tensor | int | None]:
        """The batches of a step and how many tokens it learns, which its loss is divided by: at
        least one, or a step whose samples are all dropped would divide by zero."""
        rows = [row for batch in batches for row in batch.get(ROWS, ())]
        _, learned = super().count_step(rows or batches, device)
        return batches, learned.clamp(min=1) if isinstance(learned, Tensor) else learned

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As `transformers`, which counts the model's parameters anew for each batch."""
        tokens = [batch["input_ids"].numel() for batch in inputs.get(ROWS, [inputs])]
        if self._token_flops is None:
            first = inputs.get(ROWS, [inputs])[0]
            self._token_flops = super().floating_point_ops(first) // tokens[0]
        return self._token_flops * sum(tokens)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        for batch in inputs.get(ROWS, [inputs]):
            super()._track_num_input_tokens(batch)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self._rate is not None:
            split_groups(optimizer, self.model if model is None else model, self._rate)
        if self._engine.leaves_model_as_it_is:
            shorten_steps(self.model, optimizer)
            let_go_of_originals(self.model)
        if self._engine.name == "none":
            add_in_place(self.model)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float:
        """Of what the optimizer holds: to go through all of a model takes the host milliseconds.

        Gradients of bfloat16 weights are measured in float32: `torch` keeps 8 bits of it.
        """
        if not self._engine.leaves_model_as_it_is:
            return super()._clip_grad_norm(model)
        learned = learned_by(self.optimizer)
        if self._engine.name != "none" or all(p.dtype != torch.bfloat16 for p in learned):
            return self.accelerator.clip_grad_norm_(learned, self.args.max_grad_norm)
        gradients = [p.grad for p in learned if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        torch._foreach_mul_(gradients, (self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self._order = self._order_of(dataset)
        return super()._get_train_sampler(train_dataset) if self._order is None else self._order

    def _order_of(self, dataset: Dataset) -> EpochOrder | None:
        """The order of training; None for one that is the same in each epoch."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if isinstance(dataset, PackedDataset):
            return row_order(dataset, seed)
        if isinstance(dataset, StepRows):
            return step_order(dataset, seed, self._mix)
        if self.args.train_sampling_strategy == "random":
            return sample_order(dataset.lengths, seed, mix=self._mix)
        if self.args.train_sampling_strategy == "group_by_length":
            step = self.args.train_batch_size * self.args.gradient_accumulation_steps
            step *= self.args.world_size
            return sample_order(dataset.lengths, seed, mix=self._mix, step_samples=step)
        return None

    def get_train_dataloader(self) -> DataLoader:
        """A stream gives each process what is its own: `accelerate` would split that again."""
        if not isinstance(self.train_dataset, SampleStream):
            return super().get_train_dataloader()
        return self._own_loader(self.train_dataset, self._train_batch_size, self.data_collator)

    def get_eval_dataloader(self, eval_dataset: SampleDataset | None = None) -> DataLoader:
        samples = self.eval_dataset if eval_dataset is None else eval_dataset
        share = HeldOutShare(samples, self.args.process_index, self.args.world_size)
        return self._own_loader(share, self.args.eval_batch_size, self._eval_collator)

    def _own_loader(
        self, dataset: Dataset, batch_size: int, collate: Callable[..., dict[str, Any]]
    ) -> DataLoader:
        """A loader of what is this process's alone."""
        return DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=collate,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
            worker_init_fn=LeaveSignals(None),
        )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[None, None, None]:
        """Add a batch to the eval loss, which `transformers` would weigh by samples.

        The loss has logits of its own: of those that a model returns beside it, and that autocast
        would widen to float32, one of each sample is the least there is.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            out = model(**inputs, num_items_in_batch=1, logits_to_keep=1)
        loss = out.loss  # the sum over learned tokens
        self._held_out.add(loss, inputs["labels"])
        return None, None, None

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """As `transformers`; the loss is the mean over all learned tokens of all processes."""
        self._held_out = LossSum()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss = self._held_out.mean_of_all(self.accelerator)
        samples = len(self.eval_dataset)
        return output._replace(
            metrics={**output.metrics, f"{metric_key_prefix}_loss": loss}, num_samples=samples
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._counts.places:
            now = time.perf_counter()
            counts = self._counts.of_all(self.accelerator)
            logs |= counts.summary(now - self._counted_since)
            self._counts = TokenCounts()
            self._counted_since = now
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        started = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self._counted_since += time.perf_counter() - started  # no training step ran meanwhile
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `transformers`, which under ZeRO-3 forgets what rests of copies that learn in part."""
        if self._engine.zero_stage != 3 or not isinstance(self.model, PeftModel):
            super().save_model(output_dir, _internal_call)
            return
        saved = saved_parameters(self.model)
        self._save(output_dir, whole_tensors(saved, keep=self.args.should_save))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """An adapter is saved as it is: `peft` would look at its base, on the hub even, first."""
        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            if masters := masters_of(self.model, self.optimizer):
                state_dict = self.model.state_dict() | masters
            self.model.save_pretrained(
                str(folder), state_dict=state_dict, save_embedding_layers=False
            )
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """A run cut off behind its last step has nothing left: `transformers` takes one more.

        The order of the epoch is set here: of a run that resumes in the middle of an epoch on
        several processes, `accelerate` wraps the sampler once too often to find it.
        """
        refuse_other_engine(self.model_wrapped, self._engine)
        if self._order is not None:
            self._order.set_epoch(kwargs["epoch"])
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._engine.reads_any_number:
            part_groups(self.optimizer, Path(checkpoint))
            drop_shares(Path(checkpoint))
            # From here on this run's own checkpoints are read: the best of them, at its end.
            self.model_wrapped._config.load_universal_checkpoint = False

    def _load_best_model(self) -> None:
        """As `transformers`; other numbers of processes than this may have written the best."""
        self.widen_masters()  # or what is read would be rounded
        best = self.state.best_model_checkpoint
        if self._engine.name != "deepspeed" or share_count(Path(best)) in (0, self.args.world_size):
            super()._load_best_model()
            return
        self.state.best_model_checkpoint = str(shared_out_anew(Path(best)))
        self.model_wrapped._config.load_universal_checkpoint = True
        super()._load_best_model()
        self.state.best_model_checkpoint = best

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """An adapter's weights keep their dtype: `peft` reads them as float32."""
        in_bf16 = _learns_in_bf16(self.model)
        super()._load_from_checkpoint(*args, **kwargs)
        if in_bf16 and isinstance(self.model, PeftModel):
            narrow_learned(self.model)

    def widen_masters(self) -> None:
        """Let weights be the float32 that the optimizer has of them, once all steps are taken.

        Done again it does nothing: the best checkpoint may have taken their place.
        """
        masters = {} if self._widened else masters_of(self.model, self.optimizer)
        self._widened = True
        for name, parameter in self.model.named_parameters():
            if name in masters:
                parameter.data = masters[name]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self._counted_since = time.perf_counter()  # passing over old batches is no training
        super()._load_rng_state(checkpoint)

    def _since_last_log(self) -> dict[str, Any]:
        counts = {name: int(count) for name, count in vars(self._counts).items()}
        seconds = time.perf_counter() - self._counted_since
        return super()._since_last_log() | {"seconds": seconds, "counts": counts}

    def _restore_since_last_log(self, values: dict[str, Any]) -> None:
        super()._restore_since_last_log(values)
        self._counted_since -= values["seconds"]
        self._counts = TokenCounts(**values["counts"])


def _learns_in_bf16(model: nn.Module) -> bool:
    return any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())


def compute_precision(dtype: torch.dtype) -> dict[str, bool]:
    """The Trainer's switches for weights of a dtype: learned weights are float32 beside them."""
    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
