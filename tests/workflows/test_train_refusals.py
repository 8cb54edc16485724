"""What is refused before the weights are read."""

import json
import shutil
from pathlib import Path

import pytest
from runs import quick, refused, run, write_texts
from tiny import write_qwen_vl

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def unreadable_base(tmp_path: Path) -> Path:
    """A base whose weights raise an error as soon as they are read."""
    folder = write_qwen_vl(tmp_path / "unreadable")
    (folder / "model.safetensors").write_bytes(b"no weights")
    return folder


def test_all_faults_of_the_data_are_told_before_weights_are_read(unreadable_base, tmp_path):
    picture = {"from": "user", "value": "Picture 1: <img>gone.png</img>\nWhat?"}
    records = [
        {"id": "a", "conversations": [picture, {"from": "assistant", "value": "A cat."}]},
        {"id": "b", "conversations": []},
        {"id": "c", "conversations": [{"from": "nobody", "value": "Hi"}]},
    ]
    (tmp_path / "bad.json").write_text(json.dumps(records))

    told = refused(quick(unreadable_base, tmp_path / "bad.json", tmp_path / "run"))

    for words in ("gone.png", "bad.json#0 (id a)", "bad.json#1 (id b)", "bad.json#2 (id c)"):
        assert words in told
    assert "nothing was trained" in told
    assert not (tmp_path / "run").exists()


def test_the_first_records_of_a_stream_are_checked_before_weights_are_read(
    unreadable_base, tmp_path
):
    file = write_texts(tmp_path / "train.json", "a", "")

    told = refused(quick(unreadable_base, file, tmp_path / "run", "data.streaming=true"))

    assert "train.json#1" in told
    assert "nothing was trained" in told


def test_a_recipe_that_was_mended_finds_its_directory_free(base, data, tmp_path):
    refused(quick(base, data, tmp_path / "run", "data.max_length=10"))

    run(quick(base, data, tmp_path / "run", "trainer.max_steps=1"))

    assert (tmp_path / "run" / "final").is_dir()


def test_samples_that_are_too_long_are_refused_by_default(unreadable_base, data, tmp_path):
    told = refused(quick(unreadable_base, data, tmp_path / "run", "data.max_length=130"))

    assert "133 tokens" in told
    assert "data.max_length is 130" in told


def test_data_of_which_nothing_is_left_is_refused(unreadable_base, data, tmp_path):
    drop = ("data.max_length=10", "data.too_long=drop")

    assert "nothing is left: 4 of 4 records are dropped" in refused(
        quick(unreadable_base, data, tmp_path / "run", *drop)
    )


def test_ids_that_the_model_lacks_are_refused(qwen_vocabulary, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(GOLDEN / "model_tiny_small", base, ignore=shutil.ignore_patterns("cases*"))
    shutil.copyfile(qwen_vocabulary, base / "qwen.tiktoken")
    texts = write_texts(tmp_path / "texts.json", "Hello")

    told = refused(quick(base, texts, tmp_path / "run"))

    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    assert f"texts.json#0: has the id 151645, and the model of {base} knows those below {rows}" in (
        told
    )


def test_a_base_that_is_not_whole_is_refused(unreadable_base, data, tmp_path):
    told = refused(quick(unreadable_base, data, tmp_path / "run"))

    assert "the weights cannot be read" in told
    assert not (tmp_path / "run").exists()
