"""Weights that several processes hold in shares are trained, put together and saved whole."""

import json
from pathlib import Path

import pytest
import sharded
import torch
from group import start_group
from sharded import LEARNING_RATE, step
from tiny import write_conversations, write_qwen_vl
from torch import Tensor

from vltrain.config import FreezeConfig
from vltrain.data.collation import Collator
from vltrain.data.dataset import SampleDataset
from vltrain.data.sources import read_records
from vltrain.models import load_model, load_processor
from vltrain.models.adapters import set_learned
from vltrain.models.catalog import QWEN_VL
from vltrain.models.shares import element_count, whole_tensors

Batch = tuple[dict[str, Tensor], int]


def test_a_parameter_that_is_whole_is_itself():
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))

    assert element_count(parameter) == 6
    assert torch.equal(whole_tensors([("a", parameter)], keep=True)["a"], parameter)
    assert whole_tensors([("a", parameter)], keep=False) == {}


def without_pictures(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tokens as text alone: the picture's places are spaces."""
    ids = batch["input_ids"].masked_fill(batch["input_ids"] >= 256, 32)
    return {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["plain", pytest.param("compiled", marks=pytest.mark.matrix)])
def test_fully_shard_trains_and_saves_what_one_process_does(tmp_path: Path, layers: str):
    base = write_qwen_vl(tmp_path / "base")
    samples = SampleDataset.of_records(
        read_records(write_conversations(tmp_path)), load_processor(base), labels="reference"
    )
    collate = Collator(samples.processor.pad_id)
    seen = [collate([samples[number]]) for number in (0, 1, 3)]
    read = [without_pictures(batch) for batch in seen]
    shares: list[list[Batch]] = [[], []]
    for pair in zip(seen, read, strict=True):  # process 1 never has a picture
        learned = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in pair)
        for share, batch in zip(shares, pair, strict=True):
            share.append((batch, learned))
    torch.save(shares, tmp_path / "batches.pt")

    words = (base, tmp_path / "batches.pt", tmp_path / "out", layers)
    done = start_group(2, sharded.__file__, *words)

    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((tmp_path / "out" / "said.json").read_text())
    assert said["shared"] == said["parameters"] == 61
    model = set_learned(load_model(base), QWEN_VL, FreezeConfig(projector=False)).train()
    learned_parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned_parameters, LEARNING_RATE, foreach=False)
    losses = []
    for (picture, learned), (text, _) in zip(*shares, strict=True):
        other = model(**text, num_items_in_batch=learned).loss
        other.backward()
        losses.append(float(step(model, optimizer, picture, learned) + other.detach()))
    assert said["losses"] == pytest.approx(losses, abs=1e-4)
    saved = load_model(tmp_path / "out")
    ids = torch.arange(0, 64)[None]
    torch.testing.assert_close(saved(ids).logits, model.eval()(ids).logits, atol=1e-3, rtol=1e-3)
