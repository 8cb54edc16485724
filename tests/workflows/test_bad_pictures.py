"""Runs that meet pictures which are missing or broken, under both policies."""

import io
import json
import logging
import math
from pathlib import Path

import pytest
from rich.console import Console
from tiny import write_conversations, write_qwen_vl

from vltrain.config import Recipe, load_recipe
from vltrain.errors import VltrainError
from vltrain.training.run_dir import RunDir
from vltrain.workflows.train import train

DROP = "data.bad_pictures=drop"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("bad_pictures") / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four records; the first alone shows red.png."""
    return write_conversations(tmp_path / "data")


def break_inside(picture: Path) -> None:
    """Damage that nobody sees who reads a picture's header and end."""
    content = bytearray(picture.read_bytes())
    content[len(content) // 2] ^= 255
    picture.write_bytes(content)


def recipe(base: Path, data: Path, out: Path, *overrides: str) -> Recipe:
    quick = (
        *("trainer.max_steps=8", "trainer.report_to=none", "lora.r=4"),
        *("trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=1"),
        *overrides,
    )
    return load_recipe(
        None, method="lora", model=str(base), data=[data], output=out, overrides=quick
    )


def run(recipe: Recipe) -> str:
    """Train; what was shown."""
    console = Console(file=io.StringIO(), width=300)
    train(recipe, console)
    return console.file.getvalue()


def test_a_missing_picture_stops_a_run_before_it_starts(base, data, tmp_path):
    (data.parent / "images" / "red.png").unlink()

    with pytest.raises(VltrainError, match="1 error, listed above; nothing was trained"):
        run(recipe(base, data, tmp_path / "run"))


def test_records_with_a_missing_picture_are_left_out_and_counted(base, data, tmp_path):
    (data.parent / "images" / "black.png").unlink()  # two records show it

    shown = run(recipe(base, data, tmp_path / "run", DROP, "trainer.max_steps=2"))

    assert "warning: missing picture (2)" in shown
    assert "train.json#3 (id r3): picture 'images/black.png' is missing" in shown
    assert ": the record is dropped\n" in shown
    assert "4 records: 0 errors, 2 warnings, 2 dropped records" in shown
    assert "2 samples, " in shown
    assert ", 2 dropped" in shown


def test_data_whose_pictures_are_all_missing_is_refused(base, data, tmp_path):
    for picture in (data.parent / "images").iterdir():
        picture.unlink()

    with pytest.raises(VltrainError, match="nothing is left: 4 of 4 records are dropped"):
        run(recipe(base, data, tmp_path / "run", DROP))


def test_boxes_in_pixels_of_a_missing_picture_go_with_their_record(base, data, tmp_path):
    file = tmp_path / "data" / "swift.jsonl"
    box = {"query": "<image>q", "response": "<bbox>", "images": ["no.png"]}
    box["objects"] = {"bbox": [[1, 1, 2, 2]]}
    file.write_text(json.dumps(box) + "\n" + json.dumps({"query": "q", "response": "a"}))

    shown = run(recipe(base, file, tmp_path / "run", DROP, "trainer.max_steps=1"))

    assert "2 records: 0 errors, 2 warnings, 1 dropped record" in shown


def test_a_picture_that_breaks_in_a_run_stops_it_with_record_and_path(base, data, tmp_path):
    break_inside(data.parent / "images" / "red.png")

    with pytest.raises(VltrainError, match=r"train\.json#0: picture .*red\.png cannot be read"):
        run(recipe(base, data, tmp_path / "run"))


@pytest.mark.parametrize(
    "settings",
    [(), ("data.packing=true", "data.max_length=140"), ("trainer.dataloader_num_workers=1",)],
    ids=["padded", "packed", "worker"],
)
def test_a_step_whose_only_picture_is_broken_learns_nothing_and_is_counted(
    base, data, tmp_path, caplog, settings
):
    break_inside(data.parent / "images" / "red.png")

    with caplog.at_level(logging.WARNING, "vltrain"):
        run(recipe(base, data, tmp_path / "run", DROP, *settings))

    rows = RunDir(tmp_path / "run").read_metrics()
    dropping = [row for row in rows if "dropped_samples" in row]
    assert len(rows) == 8  # two epochs of four steps
    assert [row["dropped_samples"] for row in dropping] == [1, 1]
    assert [(row["loss"], row["learned_tokens"]) for row in dropping] == [(0.0, 0)] * 2
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    assert all(row["loss"] > 0 for row in rows if row not in dropping)
    told = [entry.getMessage() for entry in caplog.records if "dropped" in entry.getMessage()]
    assert len(told) == 1  # though it was met twice
    assert "train.json#0: picture " in told[0]
    assert "red.png cannot be read" in told[0]


def test_a_batch_that_loses_one_sample_learns_as_the_others_alone_would(base, data, tmp_path):
    whole = json.loads(data.read_text(encoding="utf-8"))
    rest = tmp_path / "data" / "rest.json"
    rest.write_text(json.dumps(whole[1:]), encoding="utf-8")
    break_inside(data.parent / "images" / "red.png")
    one_step = ("trainer.max_steps=1", "trainer.per_device_train_batch_size=4", "lora.dropout=0")

    run(recipe(base, data, tmp_path / "run", *one_step, DROP))
    run(recipe(base, rest, tmp_path / "alone", *one_step))

    (lost,), (alone,) = (RunDir(tmp_path / name).read_metrics() for name in ("run", "alone"))
    assert lost["dropped_samples"] == 1
    assert lost["learned_tokens"] == alone["learned_tokens"]
    assert lost["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert lost["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
