"""The eval loss is the mean over all learned tokens, whatever the batches and the processes."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny import write_conversations, write_qwen_vl
from torch import nn
from transformers import TrainingArguments

from vltrain.data.collation import Collator
from vltrain.data.dataset import SampleDataset
from vltrain.data.sources import read_records
from vltrain.models import load_model, load_processor
from vltrain.training.held_out import HeldOutShare, LossSum
from vltrain.training.trainer import Trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("held_out") / "base")


@pytest.fixture(scope="module")
def model(base: Path) -> nn.Module:
    return load_model(base).eval()


@pytest.fixture(scope="module")
def samples(base: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleDataset:
    """Seven samples with 5 to 61 learned tokens; three have no picture."""
    folder = tmp_path_factory.mktemp("data")
    file = write_conversations(folder)
    with (folder / "text.jsonl").open("w") as lines:
        for number in range(3):
            turns = [("user", "Again?"), ("assistant", "Yes, " * (1 + 4 * number))]
            record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
            lines.write(json.dumps(record) + "\n")
    records = [*read_records(file), *read_records(folder / "text.jsonl")]
    return SampleDataset.of_records(records, load_processor(base))


@pytest.fixture(scope="module")
def mean_loss(model: nn.Module, samples: SampleDataset) -> float:
    """The mean over the learned tokens of all samples, each computed by itself."""
    losses: list[torch.Tensor] = []
    for sample in (samples[number] for number in range(len(samples))):
        ids, labels = (torch.tensor([sample[key]]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(ids, pixel_values=sample.get("pixel_values")).logits
        losses.append(
            nn.functional.cross_entropy(logits[0, :-1].double(), labels[0, 1:], reduction="none")[
                labels[0, 1:] != -100
            ]
        )
    return torch.cat(losses).mean().item()


def evaluator(base: Path, model: nn.Module, samples: SampleDataset, batch_size: int) -> Trainer:
    arguments = TrainingArguments(
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        per_device_eval_batch_size=batch_size,
    )
    collator = Collator(load_processor(base).pad_id)
    return Trainer(model=model, args=arguments, eval_dataset=samples, data_collator=collator)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_the_eval_loss_is_the_mean_over_learned_tokens_whatever_the_batch_size(
    base, model, samples, mean_loss, tmp_path, monkeypatch, batch_size
):
    monkeypatch.chdir(tmp_path)

    measured = evaluator(base, model, samples, batch_size).evaluate()

    assert measured["eval_loss"] == pytest.approx(mean_loss, abs=1e-5)
    assert measured["eval_samples_per_second"] > 0


def test_evaluation_computes_logits_of_learned_tokens_and_one_more_of_each_sample(
    base, model, samples, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places = []
    hook = model.lm_head.register_forward_pre_hook(
        lambda head, args: places.append(args[0].shape[:-1].numel())
    )

    evaluator(base, model, samples, 3).evaluate()

    hook.remove()
    assert sum(places) == sum(learned(HeldOutShare(samples, 0, 1))) + len(samples)


def learned(share: HeldOutShare) -> Iterator[int]:
    """The learned tokens of each item of a share."""
    for item in (share[place] for place in range(len(share))):
        yield sum(label != -100 for label in item["labels"])


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 9])
def test_shares_are_of_one_length_and_hold_each_sample_once(samples, processes):
    shares = [HeldOutShare(samples, process, processes) for process in range(processes)]

    assert {len(share) for share in shares} == {-(-7 // processes)}
    items = [share[place] for share in shares for place in range(len(share))]
    names = sorted(item["record"] for item in items if "record" in item)
    assert names == sorted(samples.name(number) for number in range(7))
    assert sum(map(sum, map(learned, shares))) == samples.learned_tokens.sum()


def test_the_longest_samples_come_first_on_every_process(samples):
    shares = [HeldOutShare(samples, process, 2) for process in range(2)]

    lengths = [[len(share[place]["input_ids"]) for place in range(4)] for share in shares]
    assert lengths[0] == sorted(lengths[0], reverse=True)
    assert lengths[1][-1] == 1  # filled up
    assert max(samples.lengths) == lengths[0][0]


def test_where_nothing_is_learned_there_is_no_mean():
    held_out = LossSum()
    held_out.add(torch.tensor(0.0), torch.full((1, 4), -100))

    assert math.isnan(held_out.mean_of_all(Accelerator(cpu=True)))
