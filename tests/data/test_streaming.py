"""Samples from files without end: every record once a pass, the same batches for any workers."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from letters import LetterProcessor, record
from torch.utils.data import DataLoader

from vltrain.data.dataset import RecordReader
from vltrain.data.streaming import Limits, SampleStream, Split
from vltrain.errors import VltrainError

READER = RecordReader(LetterProcessor())
LIMITS = Limits(max_length=100)
TWO = Split(batch_size=2)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Seven records in two files."""
    (tmp_path / "a.json").write_text(json.dumps([record("q", "a")] * 4))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(record("q", "b")) + "\n" for _ in "123"))
    return [tmp_path / "a.json", tmp_path / "b.jsonl"]


def stream(
    files: list[Path], split: Split = TWO, buffer: int = 3, limits: Limits = LIMITS
) -> SampleStream:
    return SampleStream(files, READER, limits, split, buffer=buffer, seed=5)


def names(samples: SampleStream, count: int) -> list[str]:
    return [sample["record"] for sample in islice(samples, count)]


def batches(samples: SampleStream, workers: int, count: int) -> list[list[str]]:
    """The names of the records of the first batches that a loader gives."""
    loader = DataLoader(
        samples,
        batch_size=samples.split.batch_size,
        num_workers=workers,
        collate_fn=lambda batch: [sample["record"] for sample in batch],
    )
    return list(islice(loader, count))


def test_every_pass_shows_each_record_once_in_an_order_of_its_own(files):
    shown = names(stream(files), 21)

    passes = [shown[:7], shown[7:14], shown[14:]]
    everything = {"a.json#0", "a.json#1", "a.json#2", "a.json#3"} | {f"b.jsonl#{n}" for n in "012"}
    assert all(Counter(one) == dict.fromkeys(everything, 1) for one in passes)
    assert len({tuple(one) for one in passes}) == 3


def test_the_order_is_that_of_the_seed(files):
    shown = names(stream(files), 14)

    assert names(stream(files), 14) == shown
    other = stream(files)
    other.seed = 6
    assert names(other, 14) != shown


def test_a_buffer_of_one_leaves_the_order_as_it_is(files):
    in_order = [f"a.json#{n}" for n in range(4)] + [f"b.jsonl#{n}" for n in range(3)]

    assert names(stream(files, buffer=1), 7) == in_order


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_batches_are_the_same_for_any_number_of_workers(files, workers):
    shown = names(stream(files), 20)

    found = batches(stream(files), workers, 10)

    assert found == [shown[at : at + 2] for at in range(0, 20, 2)]


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_take_batches_in_turn(files, workers):
    shown = names(stream(files), 24)
    every_batch = [shown[at : at + 2] for at in range(0, 24, 2)]

    for rank in range(3):
        split = Split(2, rank, 3)
        assert batches(stream(files, split), workers, 4) == every_batch[rank::3]


def test_a_faulty_record_stops_the_stream_where_it_comes_and_is_named(tmp_path):
    lines = [json.dumps(record("q", "a"))] * 2 + ['{"id": ']  # one is held, one is shown
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    samples = iter(stream([tmp_path / "a.jsonl"], buffer=1))

    assert next(samples)["record"] == "a.jsonl#0"
    with pytest.raises(VltrainError, match=r"^a\.jsonl#2: not JSON"):
        next(samples)


def test_a_record_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{}]))

    with pytest.raises(VltrainError, match=r"^a\.json#0: the record has no `conversations`"):
        next(iter(stream([tmp_path / "a.json"])))


def test_a_file_without_records_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("")

    with pytest.raises(VltrainError, match="holds no record"):
        next(iter(stream([tmp_path / "a.jsonl"])))


def test_too_long_records_are_refused_or_stand_as_dropped(files):
    short = replace(LIMITS, max_length=30)

    with pytest.raises(VltrainError, match=r"^a\.json#0: 34 tokens, data\.max_length is 30"):
        next(iter(stream(files, buffer=1, limits=short)))
    dropped = next(iter(stream(files, buffer=1, limits=replace(short, too_long="drop"))))
    assert set(dropped) == {"dropped"}
    assert dropped["dropped"].startswith("a.json#0: 34 tokens")


def test_an_id_that_the_model_has_not_is_refused(files):
    with pytest.raises(VltrainError, match=r"^a\.json#0: has the token id 121"):
        next(iter(stream(files, buffer=1, limits=replace(LIMITS, vocabulary_size=121))))
