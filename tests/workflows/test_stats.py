"""`vltrain stats`, as the user sees it."""

import json
from pathlib import Path

import pytest
from tiny import write_conversations, write_qwen_vl

from vltrain.errors import VltrainError
from vltrain.workflows.stats import stats


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder without weights: figures need none."""
    folder = write_qwen_vl(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    return str(folder)


def test_the_figures_are_printed_by_subject(tmp_path: Path, model: str, capsys):
    stats([write_conversations(tmp_path)], model=model)

    out = capsys.readouterr().out
    lines = out.splitlines()
    subjects = [line for line in lines if not line.startswith(" ")]
    assert subjects == [
        "records",
        "tokens per sample",
        "pictures",
        "boxes",
        "script",
        "longer than",
        "packing",
    ]
    assert "  5 in all, 4 different files" in lines
    assert "  4 in 4 of 4 samples" in lines
    assert "    1 in a sample  " + "█" * 40 + " 3" in lines
    assert "    2 in a sample  " + "█" * 13 + " 1" in lines
    assert "  width in pixels: 56 to 56, median 56, mean 56.0, 95 of 100 at most 56" in lines


def test_tokens_are_those_of_the_model(tmp_path: Path, model: str, capsys):
    file = tmp_path / "one.json"
    turns = [{"from": "user", "value": "ab"}, {"from": "assistant", "value": "c"}]
    file.write_text(json.dumps([{"conversations": turns}]))

    stats([file], model=model, max_length=100, as_json=True)

    # A turn is its text, its role and 4 tokens around them; every letter is a token.
    system = len("You are a helpful assistant.") + len("system") + 4
    tokens = system + len("abuser") + 4 + len("cassistant") + 4
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == tokens
    assert found["learned_tokens"] == 2  # the answer and the end of its turn
    assert found["lengths"]["median"] == tokens
    assert found["packing"] == {
        "max_length": 100,
        "samples": 1,
        "rows": 1,
        "efficiency": tokens / 100,
    }


def test_what_is_learned_follows_the_labels_of_the_run(tmp_path: Path, model: str, capsys):
    file = tmp_path / "one.json"
    turns = [{"from": "user", "value": "ab"}, {"from": "assistant", "value": "c"}]
    file.write_text(json.dumps([{"conversations": turns}]))

    stats([file], model=model, labels="reference", as_json=True)

    # Beginning, end and line end of three turns and the answer; nothing predicts the very first.
    assert json.loads(capsys.readouterr().out)["learned_tokens"] == 3 * 3 + 1 - 1


def test_records_that_are_left_out_are_said(tmp_path: Path, model: str, capsys):
    file = write_conversations(tmp_path)
    file.write_text(json.dumps([*json.loads(file.read_text(encoding="utf-8")), {}]))

    stats([file], model=model)

    assert "1 left out here: `vltrain check` says what is wrong" in capsys.readouterr().out


def test_files_without_a_readable_record_are_an_error(tmp_path: Path, model: str):
    file = tmp_path / "none.json"
    file.write_text("[{}]")

    with pytest.raises(VltrainError, match=r"none.json: no record can be read"):
        stats([file], model=model)
