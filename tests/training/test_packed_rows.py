"""Learning from packed rows: what is lost and learned is what samples alone lose and teach."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_conversations, write_qwen_vl
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainingArguments

from vltrain.config import FreezeConfig
from vltrain.data.collation import Collator, collate_rows
from vltrain.data.dataset import SampleDataset
from vltrain.data.packing import PackedDataset
from vltrain.data.sources import read_records
from vltrain.models import load_model, load_processor
from vltrain.models.adapters import set_learned
from vltrain.models.attention import attend_packed
from vltrain.models.catalog import QWEN_VL
from vltrain.training.callbacks import MetricsLog
from vltrain.training.epoch_order import row_order
from vltrain.training.trainer import Trainer

ROW_TOKENS = 256


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("packing") / "base")


@pytest.fixture(scope="module")
def samples(base: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleDataset:
    """Ten samples of different lengths; four have pictures, one of them two."""
    folder = tmp_path_factory.mktemp("data")
    records = read_records(write_conversations(folder))
    for number in range(6):
        turns = [("user", "Again?"), ("assistant", "Yes, " * (1 + 4 * number))]
        record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
        with (folder / "text.jsonl").open("a") as lines:
            lines.write(json.dumps(record) + "\n")
    records += read_records(folder / "text.jsonl")
    return SampleDataset.of_records(records, load_processor(base), labels="reference")


def loss_and_gradients(
    base: Path, batch: dict[str, Tensor | int], *, packed: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of everything that can learn, in float32."""
    model = set_learned(
        load_model(base), QWEN_VL, FreezeConfig(vision=False, projector=False)
    ).train()
    model.config.use_cache = False
    if packed:
        attend_packed(model)
    learned = (batch["labels"][:, 1:] != -100).sum()
    loss = model(**batch, num_items_in_batch=learned).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def test_a_row_has_the_loss_and_the_gradients_of_its_samples_padded(base, samples):
    chosen = [samples[number] for number in (4, 2, 9, 0)]  # text, two pictures, text, one picture

    row_loss, row_gradients = loss_and_gradients(base, collate_rows([chosen]), packed=True)

    padded = Collator(samples.processor.pad_id)(chosen)
    loss, gradients = loss_and_gradients(base, padded, packed=False)
    torch.testing.assert_close(row_loss, loss, rtol=1e-5, atol=1e-5)
    assert row_gradients.keys() == gradients.keys()
    assert any(".visual.conv1" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(row_gradients[name], gradient, rtol=1e-5, atol=1e-5)
        assert gradient.abs().max() > 0, name


def test_a_row_and_its_samples_padded_have_as_much_to_learn(samples):
    chosen = [samples[number] for number in (4, 2, 9, 0)]

    row, padded = collate_rows([chosen]), Collator(samples.processor.pad_id)(chosen)

    assert (row["labels"][:, 1:] != -100).sum() == (padded["labels"][:, 1:] != -100).sum()


@pytest.mark.parametrize("epoch", [0, 1])
def test_rows_come_in_the_same_order_whatever_the_number_of_workers(samples, epoch):
    rows = PackedDataset(samples, ROW_TOKENS)
    order = row_order(rows, seed=3)
    order.set_epoch(epoch)

    batches = [
        list(DataLoader(rows, sampler=order, collate_fn=collate_rows, num_workers=workers))
        for workers in (0, 2)
    ]

    assert len(batches[0]) == len(batches[1]) == len(rows) == len(order)
    for one, other in zip(*batches, strict=True):
        assert one.keys() == other.keys()
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_the_order_of_rows_is_another_in_another_epoch(samples):
    order = row_order(PackedDataset(samples, ROW_TOKENS), seed=3)
    first = list(order)

    order.set_epoch(1)

    assert list(order) != first


def train(base: Path, samples: SampleDataset, out: Path, **settings) -> list[dict]:
    """The logged rows of a full run on packed rows, evaluated on the samples padded."""
    model = set_learned(load_model(base), QWEN_VL, FreezeConfig())
    model.config.use_cache = False
    attend_packed(model)
    options = {"learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "seed": 3}
    options |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none"} | settings
    logged: list[dict] = []
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(out), remove_unused_columns=False, **options),
        train_dataset=PackedDataset(samples, ROW_TOKENS),
        eval_dataset=samples,
        data_collator=collate_rows,
        eval_collator=Collator(samples.processor.pad_id),
        callbacks=[MetricsLog(logged.append)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return logged


def test_two_rows_at_once_lose_what_one_at_a_time_loses(base, samples, tmp_path):
    at_once = train(base, samples, tmp_path / "a", per_device_train_batch_size=2, max_steps=3)
    by_one = train(
        base,
        samples,
        tmp_path / "b",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=3,
    )

    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("learned_tokens", 0)):
        one, other = ([row[key] for row in rows] for rows in (at_once, by_one))
        assert len(one) == 3
        assert one == pytest.approx(other, rel=tolerance)


def test_an_epoch_of_rows_learns_every_token_once_and_pads_none(base, samples, tmp_path):
    logged = train(base, samples, tmp_path, num_train_epochs=1, per_device_train_batch_size=1)

    assert sum(row["learned_tokens"] for row in logged) == sum(samples.learned_tokens)
    assert {row["padding_share"] for row in logged} == {0.0}


def test_evaluation_is_that_of_samples_padded(base, samples, tmp_path):
    settings = {"learning_rate": 0.0, "per_device_eval_batch_size": 1, "eval_strategy": "epoch"}

    logged = train(base, samples, tmp_path, num_train_epochs=1, **settings)

    measured = [row["eval_loss"] for row in logged if "eval_loss" in row]
    model = load_model(base)
    collator = Collator(samples.processor.pad_id)
    losses = [model(**collator([samples[number]])).loss.item() for number in range(len(samples))]
    mean = np.average(losses, weights=samples.learned_tokens)
    assert measured == pytest.approx([mean], rel=1e-4)
