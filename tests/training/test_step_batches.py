"""Steps of packed samples: what they lose and teach is what the same samples do unpacked."""

import re
from pathlib import Path

import pytest
import torch
from tiny import write_conversations, write_qwen_vl
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from vltrain.config import FreezeConfig
from vltrain.data.collation import Collator, collate_rows
from vltrain.data.dataset import SampleDataset
from vltrain.data.sources import read_records
from vltrain.data.step_rows import StepRows, StepShare, split_step
from vltrain.errors import NotFiniteError
from vltrain.models import load_model, load_processor
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.attention import attend_packed
from vltrain.models.catalog import QWEN_VL
from vltrain.training.callbacks import MetricsLog
from vltrain.training.trainer import Trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("steps") / "base")


@pytest.fixture(scope="module")
def samples(base: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleDataset:
    """Ten samples of different lengths, most of them with pictures."""
    records = read_records(write_conversations(tmp_path_factory.mktemp("data")))
    records = (records * 4)[:10]
    return SampleDataset.of_records(records, load_processor(base), labels="reference")


class Gradients(TrainerCallback):
    """Of each step, as they are clipped."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []

    def on_pre_optimizer_step(self, *_, model: nn.Module, **__) -> None:
        self.steps.append([p.grad.clone() for p in model.parameters() if p.requires_grad])


def train(base: Path, dataset, out: Path, **settings) -> tuple[list[dict], list[list[Tensor]]]:
    """The logged lines and the gradients of three steps of LoRA."""
    model = load_model(base)
    model.config.use_cache = False
    packed = isinstance(dataset, StepRows)
    if packed:
        attend_packed(model)
    adapted = add_lora(model, QWEN_VL, FreezeConfig(), Adapter(r=4, dropout=0.0), seed=0)
    logged: list[dict] = []
    gradients = Gradients()
    options = {"learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "seed": 3}
    options |= {"per_device_train_batch_size": 1, "num_train_epochs": 1}
    options |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none"} | settings
    trainer = Trainer(
        model=adapted,
        args=TrainingArguments(str(out), remove_unused_columns=False, **options),
        train_dataset=dataset,
        data_collator=collate_rows if packed else Collator(0),
        eval_collator=Collator(0),
        callbacks=[MetricsLog(logged.append), gradients],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return logged, gradients.steps


@pytest.mark.parametrize("row_tokens", [10_000, 300])
def test_a_step_has_the_loss_and_the_gradients_of_its_samples_one_by_one(
    base, samples, tmp_path, row_tokens
):
    steps = StepRows(samples, step_samples=4, row_tokens=row_tokens)
    forwards = [len(share) for share in steps.shares(range(10))]
    assert (max(forwards) > 1) == (row_tokens == 300), "the budget decides about the rows"

    logged, gradients = train(base, steps, tmp_path / "packed")

    plain, expected = train(base, samples, tmp_path / "plain", gradient_accumulation_steps=4)
    assert [row["learned_tokens"] for row in logged] == [row["learned_tokens"] for row in plain]
    assert len(logged) == 3
    for ours, theirs in zip(logged, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["padding_share"] == 0
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


class Blinding(StepRows):
    """Of which the first picture is not a number."""

    def __getitem__(self, share: StepShare) -> list[list[dict]]:
        rows = super().__getitem__(share)
        for numbers, row in zip(share, rows, strict=True):
            for number, sample in zip(numbers, row, strict=True):
                sample["record"] = f"number {number}"
                if number == 0:
                    sample["pixel_values"] = sample["pixel_values"] * float("nan")
        return rows


def test_of_a_step_that_is_not_finite_the_row_is_named_that_is_not(base, samples, tmp_path):
    steps = Blinding(samples, step_samples=10, row_tokens=int(max(samples.lengths)))
    broken = split_step(samples.lengths.tolist(), steps.row_tokens, 1)[0]
    assert len(broken) > 1

    with pytest.raises(NotFiniteError) as error:
        train(base, steps, tmp_path)

    named = {int(n) for n in re.findall(r"number (\d+)", str(error.value))}
    assert 0 in named
    assert len(named) < 10
