"""The loop: what its logs say, and that accumulating changes no loss."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate.data_loader import SeedableRandomSampler
from PIL import Image
from rich.console import Console
from tiny import write_conversations, write_qwen_vl
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from vltrain.config import FreezeConfig
from vltrain.data.collation import Collator
from vltrain.data.dataset import SampleDataset
from vltrain.data.mixing import Mix, Portion
from vltrain.data.sources import read_records
from vltrain.models import load_model, load_processor
from vltrain.models.adapters import Adapter, add_lora, set_learned
from vltrain.models.catalog import QWEN_VL
from vltrain.training.callbacks import MetricsLog, ProgressBar
from vltrain.training.epoch_order import sample_order
from vltrain.training.plot import plot_loss
from vltrain.training.step_batches import ROWS
from vltrain.training.trainer import TokenCounts, Trainer, compute_precision


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("trainer") / "base")


@pytest.fixture(scope="module")
def samples(base: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleDataset:
    """Eight samples, the longest twice as long as the shortest; half have no picture."""
    folder = tmp_path_factory.mktemp("data")
    file = write_conversations(folder)
    for number in range(4):
        turns = [("user", "Again?"), ("assistant", "Yes, " * (1 + 4 * number))]
        record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
        with (folder / "text.jsonl").open("a") as lines:
            lines.write(json.dumps(record) + "\n")
    records = [*read_records(file), *read_records(folder / "text.jsonl")]
    return SampleDataset.of_records(records, load_processor(base))


def train(
    base: Path, samples: SampleDataset, out: Path, resume: Path | None = None, **settings
) -> list[dict]:
    """The logged rows of a full run in float32."""
    model = set_learned(load_model(base), QWEN_VL, FreezeConfig())
    options = {"learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "seed": 3}
    options |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none"} | settings
    arguments = TrainingArguments(str(out), remove_unused_columns=False, **options)
    rows: list[dict] = []
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        eval_dataset=samples,
        data_collator=Collator(load_processor(base).pad_id),
        callbacks=[MetricsLog(rows.append)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return rows


def test_tokens_are_counted_by_what_is_real_what_is_learned_and_what_is_padding():
    counts = TokenCounts()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = torch.tensor([[7, -100, 8, 9], [-100, 5, -100, -100]])  # nothing predicts the 7
    counts.add(mask, labels)
    counts.add(torch.tensor([[1, 1]]), torch.tensor([[-100, 4]]))

    assert counts.summary(seconds=4.0) == {
        "tokens_per_second": 2.0,  # 6 + 2 tokens in 4 s
        "learned_tokens": 4,
        "padding_share": pytest.approx(0.2),  # 2 of 10 places
    }


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_four_samples_at_once_lose_what_one_at_a_time_loses(base, samples, tmp_path, order):
    steps = {"max_steps": 3, "train_sampling_strategy": order}

    at_once = train(base, samples, tmp_path / "a", per_device_train_batch_size=4, **steps)
    by_one = train(
        base,
        samples,
        tmp_path / "b",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **steps,
    )

    losses = [[row["loss"] for row in rows] for rows in (at_once, by_one)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    norms = [[row["grad_norm"] for row in rows] for rows in (at_once, by_one)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    learned = [[row["learned_tokens"] for row in rows] for rows in (at_once, by_one)]
    assert learned[0] == learned[1]
    assert {row["padding_share"] for row in by_one} == {0.0}
    assert all(row["padding_share"] > 0 for row in at_once)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_samples_are_shuffled_as_transformers_and_accelerate_shuffle_them(epoch):
    theirs = SeedableRandomSampler(range(50), generator=torch.Generator(), data_seed=7)
    order = sample_order(np.ones(50, np.int32), 7)
    for sampler in (theirs, order):
        sampler.set_epoch(epoch)

    assert list(order) == list(theirs)


@pytest.mark.parametrize("epoch", [0, 1])
def test_samples_are_grouped_by_length_as_transformers_groups_them(epoch):
    lengths = [(7 * number) % 31 for number in range(100)]
    generator = torch.Generator().manual_seed(7 * 1_000_003 + epoch)
    theirs = get_length_grouped_indices(lengths, 3, generator=generator)

    order = sample_order(np.array(lengths), 7, step_samples=3)
    order.set_epoch(epoch)

    assert list(order) == theirs


@pytest.mark.parametrize("step_samples", [None, 2])
def test_an_epoch_of_a_mix_is_what_the_mix_shows_in_another_order(step_samples):
    mix = Mix((Portion(Path("a"), np.arange(4), 8), Portion(Path("b"), np.arange(4, 8), 2)))
    order = sample_order(np.arange(8), 7, mix=mix, step_samples=step_samples)
    order.set_epoch(3)

    shown = mix.numbers(seed=7, epoch=3).tolist()
    assert sorted(order) == sorted(shown)
    assert list(order) != shown
    assert len(order) == 10


def test_a_logged_step_says_all_that_metrics_are_made_of(base, samples, tmp_path):
    settings = {"per_device_train_batch_size": 4, "eval_strategy": "epoch"}
    rows = train(base, samples, tmp_path, max_steps=2, **settings)

    keys = {"step", "epoch", "loss", "learning_rate", "grad_norm"}
    counted = {"tokens_per_second", "learned_tokens", "padding_share"}
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == [1, 2]
    assert all(row.keys() == keys | counted for row in logged)
    assert all(row["tokens_per_second"] > 0 for row in logged)
    measured = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in measured] == [2]
    assert len(rows) == 3  # the Trainer's summary is none of them


def test_a_run_that_was_cut_off_behind_its_last_step_takes_no_other(base, samples, tmp_path):
    # 8 samples, 4 a step: step 3 is in the middle of the second epoch
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "steps"}
    train(base, samples, tmp_path, save_steps=3, **settings)

    rows = train(
        base, samples, tmp_path, resume=tmp_path / "checkpoint-3", save_steps=3, **settings
    )

    assert rows == []


def test_operations_are_counted_as_transformers_counts_them(base, samples, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model=load_model(base), args=arguments, train_dataset=samples)
    batches = [{"input_ids": torch.zeros(1, length, dtype=torch.long)} for length in (5, 9)]

    theirs = [transformers.Trainer.floating_point_ops(trainer, batch) for batch in batches]

    assert [trainer.floating_point_ops(batch) for batch in batches] == theirs
    assert trainer.floating_point_ops({ROWS: batches}) == sum(theirs) > 0


def test_a_step_that_is_left_out_moves_no_weight(base, samples, tmp_path, monkeypatch):
    model = set_learned(load_model(base), QWEN_VL, FreezeConfig())
    weights: list[torch.Tensor] = []

    class Recorder(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            weights.append(model.lm_head.weight.detach().clone())

    loss = Trainer.compute_loss
    monkeypatch.setattr(
        Trainer,
        "compute_loss",
        lambda self, *args, **more: (
            loss(self, *args, **more) * (torch.nan if self.state.global_step == 1 else 1)
        ),
    )
    options = {"max_steps": 3, "use_cpu": True, "save_strategy": "no", "report_to": "none"}
    arguments = TrainingArguments(str(tmp_path), learning_rate=1e-2, weight_decay=0.1, **options)
    collator = Collator(load_processor(base).pad_id)
    Trainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=collator,
        stop_after_nonfinite=2,
        callbacks=[Recorder()],
    ).train()

    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_all_of_a_model_with_adapters_is_in_training_mode_in_a_step(base, samples, tmp_path):
    adapted = add_lora(load_model(base), QWEN_VL, FreezeConfig(), Adapter(r=2), seed=0)
    modes: list[bool] = []
    adapted.register_forward_pre_hook(
        lambda model, _: modes.extend(module.training for module in model.modules())
    )
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, save_strategy="no", report_to="none"
    )
    collator = Collator(load_processor(base).pad_id)

    Trainer(model=adapted, args=arguments, train_dataset=samples, data_collator=collator).train()

    assert all(modes)
    assert len(modes) > 100


def test_losses_are_logged_unrounded(base, samples, tmp_path):
    rows = train(base, samples, tmp_path, max_steps=2)

    losses = [row["loss"] for row in rows]
    assert any(round(loss, 6) != loss for loss in losses)
    assert [json.loads(json.dumps(loss)) for loss in losses] == losses


@pytest.mark.parametrize(
    ("dtype", "switches"),
    [
        (torch.bfloat16, {"bf16": True, "fp16": False}),
        (torch.float16, {"bf16": False, "fp16": True}),
        (torch.float32, {"bf16": False, "fp16": False}),
    ],
)
def test_the_weights_dtype_is_the_one_that_is_computed_in(dtype, switches):
    assert compute_precision(dtype) == switches


def shown(logs: list[dict], max_steps: int) -> list[str]:
    """What a bar without a terminal prints of a run of such logs."""
    console = Console(file=io.StringIO(), width=120)
    bar, state, control = ProgressBar(console), TrainerState(max_steps=max_steps), TrainerControl()
    arguments = TrainingArguments(use_cpu=True)
    bar.on_train_begin(arguments, state, control)
    for step, row in enumerate(logs, start=1):
        state.global_step = step
        bar.on_step_end(arguments, state, control)
        bar.on_log(arguments, state, control, logs=row)
    bar.on_train_end(arguments, state, control)
    return console.file.getvalue().splitlines()


def test_without_a_terminal_the_first_step_and_the_last_are_said():
    row = {"loss": 1.25, "learning_rate": 1e-4, "tokens_per_second": 1234.5}

    lines = shown([row, row, row | {"loss": 0.5}], max_steps=3)

    assert lines == [
        "step 1/3  loss 1.2500  lr 1.00e-04  1,234 tokens/s",
        "step 3/3  loss 0.5000  lr 1.00e-04  1,234 tokens/s",
    ]


def test_every_eval_loss_is_said():
    assert shown([{"eval_loss": 0.75}, {"eval_loss": 0.5}], max_steps=2) == [
        "step 1: eval loss 0.7500",
        "step 2: eval loss 0.5000",
    ]


def test_the_loss_is_drawn_as_a_picture(tmp_path: Path):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}]

    plot_loss(rows, tmp_path / "loss.png")

    with Image.open(tmp_path / "loss.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (960, 540))
        assert len(picture.convert("RGB").getcolors(100_000)) > 10


def test_a_run_without_any_loss_is_drawn_as_an_empty_plot(tmp_path: Path):
    plot_loss([], tmp_path / "loss.png")

    assert (tmp_path / "loss.png").is_file()
