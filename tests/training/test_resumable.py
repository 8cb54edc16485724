"""The Trainer whose checkpoints appear whole and whose steps are never NaN."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_conversations, write_qwen_vl
from torch import nn
from transformers import PrinterCallback, TrainingArguments

from vltrain.config import FreezeConfig
from vltrain.data.collation import Collator
from vltrain.data.dataset import SampleDataset
from vltrain.data.sources import read_records
from vltrain.errors import NotFiniteError, Stopped
from vltrain.models import load_model, load_processor
from vltrain.models.adapters import set_learned
from vltrain.models.catalog import QWEN_VL
from vltrain.training.callbacks import MetricsLog
from vltrain.training.checkpoints import checkpoint_fault, last_whole
from vltrain.training.trainer import Trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("resumable") / "base")


@pytest.fixture(scope="module")
def samples(base: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleDataset:
    file = write_conversations(tmp_path_factory.mktemp("data"))
    return SampleDataset.of_records(read_records(file), load_processor(base))


class Loop:
    """A full run of four samples, one a step, in float32; `rows` is what it logged."""

    def __init__(self, base: Path, samples: SampleDataset, out: Path) -> None:
        self.base, self.samples, self.out = base, samples, out
        self.rows: list[dict[str, Any]] = []
        self.said: list[str] = []

    def train(self, trainer_type: type[Trainer] = Trainer, **settings: Any) -> Trainer:
        own = {key: settings.pop(key) for key in OWN if key in settings}
        options = {"learning_rate": 1e-3, "logging_steps": 1, "seed": 3, "max_steps": 6}
        options |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none"}
        options |= {"save_strategy": "no", "per_device_train_batch_size": 1}
        options |= {"logging_nan_inf_filter": False} | settings
        model = set_learned(load_model(self.base), QWEN_VL, FreezeConfig())
        resume = last_whole(self.out)
        trainer = trainer_type(
            model=model,
            args=TrainingArguments(str(self.out), remove_unused_columns=False, **options),
            train_dataset=self.samples,
            eval_dataset=self.samples,
            data_collator=Collator(load_processor(self.base).pad_id),
            callbacks=[MetricsLog(self.rows.append)],
            **own,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    def losses(self) -> list[tuple[int, float]]:
        return [(row["step"], row["loss"]) for row in self.rows if "loss" in row]


OWN = ("stop_requested", "stop_after_nonfinite")


@pytest.fixture
def loop(base: Path, samples: SampleDataset, tmp_path: Path) -> Loop:
    return Loop(base, samples, tmp_path / "run")


def stop_at(step: int):
    """Asks for a stop at a step, as a signal would; it is looked for twice in each."""
    asked = iter(range(2, 1000))
    return lambda: next(asked) // 2 >= step


# --- checkpoints ---


class Watching(Trainer):
    """Notes what lies in the run's directory while a checkpoint is written."""

    seen: list[set[str]]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.seen = [
            *getattr(self, "seen", []),
            {p.name for p in Path(self.args.output_dir).iterdir()},
        ]


def test_a_checkpoint_has_its_name_only_when_all_of_it_is_written(loop: Loop):
    trainer = loop.train(Watching, save_strategy="steps", save_steps=2, save_total_limit=2)

    assert trainer.seen == [
        {"checkpoint.partial"},
        {"checkpoint.partial", "checkpoint-2"},
        {"checkpoint.partial", "checkpoint-2", "checkpoint-4"},
    ]
    assert {p.name for p in loop.out.iterdir()} == {"checkpoint-4", "checkpoint-6"}
    assert checkpoint_fault(loop.out / "checkpoint-6") is None


def test_the_saved_state_says_where_the_best_checkpoint_is(loop: Loop):
    every_step = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps"}

    trainer = loop.train(
        **every_step, eval_steps=1, load_best_model_at_end=True, save_total_limit=1, max_steps=3
    )

    best = trainer.state.best_model_checkpoint
    assert best == str(loop.out / f"checkpoint-{trainer.state.best_global_step}")
    state = json.loads((Path(best) / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best


# --- a stop ---


def test_a_stop_saves_the_step_and_is_no_error_that_something_could_catch(loop: Loop):
    with pytest.raises(Stopped) as stopped:
        loop.train(stop_requested=stop_at(3), save_strategy="steps", save_steps=100)

    place = loop.out / "checkpoint-3"
    assert str(stopped.value) == (
        f"stopped after step 3 of 6, saved in {place}\n  to go on: give the same command again"
    )
    assert checkpoint_fault(place) is None
    assert not isinstance(stopped.value, Exception)


def test_a_stop_is_saved_even_where_no_checkpoint_was_asked_for(loop: Loop):
    with pytest.raises(Stopped):
        loop.train(stop_requested=stop_at(1))

    assert checkpoint_fault(loop.out / "checkpoint-1") is None


@pytest.mark.parametrize(
    "step", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_what_was_computed_before_a_stop_is_in_the_log_after_it(loop: Loop, tmp_path, step):
    settings = {"logging_steps": 3, "eval_strategy": "epoch", "per_device_train_batch_size": 2}
    whole = Loop(loop.base, loop.samples, tmp_path / "whole")
    whole.train(**settings)

    with pytest.raises(Stopped):
        loop.train(**settings, stop_requested=stop_at(step))
    loop.train(**settings)

    def repeated(rows: list[dict]) -> list[dict]:
        keys = ("step", "epoch", "loss", "eval_loss", "learned_tokens", "padding_share")
        return [{k: row[k] for k in keys if k in row} for row in rows]

    assert repeated(loop.rows) == repeated(whole.rows)
    assert [step for step, _ in loop.losses()] == [3, 6]
    assert [row["step"] for row in loop.rows if "eval_loss" in row] == [2, 4, 6]


def test_the_loss_of_an_epoch_outlives_a_stop_at_its_end(loop: Loop, tmp_path):
    settings = {"logging_strategy": "epoch", "max_steps": 8}
    whole = Loop(loop.base, loop.samples, tmp_path / "whole")
    whole.train(**settings)

    with pytest.raises(Stopped):
        loop.train(**settings, stop_requested=stop_at(4))
    loop.train(**settings)

    assert [step for step, _ in loop.losses()] == [4, 8]
    assert loop.losses() == whole.losses()


def test_evaluation_changes_nothing_of_what_is_learned(loop: Loop, tmp_path):
    with_none = Loop(loop.base, loop.samples, tmp_path / "none")
    with_none.train()

    loop.train(eval_strategy="steps", eval_steps=1)

    assert loop.losses() == with_none.losses()


# --- losses that are no numbers ---


class Poisoned(Trainer):
    """Whose loss is NaN at some steps, counted from 1."""

    steps: tuple[int, ...] = ()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * float("nan") if self.state.global_step + 1 in self.steps else loss


def poisoned(*at: int) -> type[Trainer]:
    return type("PoisonedAt", (Poisoned,), {"steps": at})


def test_a_step_without_a_finite_loss_is_left_out_and_named(loop: Loop, caplog):
    trainer = loop.train(poisoned(2), stop_after_nonfinite=2)

    finite = [step for step, loss in loop.losses() if loss == loss]
    assert finite == [1, 3, 4, 5, 6]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    (warning,) = [r.getMessage() for r in caplog.records if "step 2 is left out" in r.getMessage()]
    assert "train.json#" in warning


def test_enough_of_them_in_a_row_end_the_run_before_its_checkpoint(loop: Loop):
    saved = {"save_strategy": "steps", "save_steps": 2}

    with pytest.raises(
        NotFiniteError, match=r"step 4: .* 2 steps in a row; it came of .*train\.json#"
    ):
        loop.train(poisoned(3, 4), stop_after_nonfinite=2, **saved)

    assert [p.name for p in loop.out.glob("checkpoint*")] == ["checkpoint-2"]
    assert [step for step, _ in loop.losses()] == [1, 2, 3]


def test_a_gradient_that_is_not_finite_counts_as_well(loop: Loop):
    class Overflowing(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss + 0 * torch.sqrt(0 * loss)  # as it was, and its gradient is inf * 0

    with pytest.raises(NotFiniteError, match="step 1: "):
        loop.train(Overflowing)
