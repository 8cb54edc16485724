"""`vltrain check`, as the user sees it."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vltrain.data.checks import check_files
from vltrain.errors import VltrainError
from vltrain.workflows.inspect import check, refuse_errors

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def faulty(tmp_path):
    """A file with an error in record 1 and a warning in record 2."""
    turns = [{"from": "user", "value": "[red]q[/red]"}, {"from": "assistant", "value": "a"}]
    values = [
        {"id": "fine", "conversations": turns},
        {"id": "bad", "conversations": [turns[0]]},
        {"id": "odd", "conversations": [turns[1], *turns]},
    ]
    file = tmp_path / "train.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    return file


def test_findings_are_printed_by_kind_with_their_place_and_fix(faulty, capsys):
    assert check([faulty]) == 1

    assert capsys.readouterr().out == (
        "error: nothing to learn (1)\n"
        f"  {faulty}#1 (id bad): no assistant turn says anything: there is nothing to learn\n"
        "    fix: add an answer, or remove the record\n"
        "warning: leading assistant (1)\n"
        f"  {faulty}#2 (id odd): turn 0 (assistant) answers nothing and is not learned\n"
        "    fix: begin with a user turn\n"
        "3 records: 1 error, 1 warning\n"
    )


def test_what_a_file_says_cannot_control_the_terminal(tmp_path, capsys):
    question = {"from": "user", "value": "<img>\x1b[2J\x00\ud800.png</img>"}
    value = {"id": "\x1b]0;\x07", "conversations": [question, {"from": "gpt", "value": "a"}]}
    file = tmp_path / "train.json"
    file.write_text(json.dumps([value]))

    assert check([file]) == 1

    out = capsys.readouterr().out
    assert "missing picture" in out
    assert all(character.isprintable() or character == "\n" for character in out)


def test_json_output_is_one_object(faulty, capsys):
    assert check([faulty], as_json=True) == 1

    report = json.loads(capsys.readouterr().out)
    assert report["records"] == 3
    assert [(f["record"], f["severity"]) for f in report["findings"]] == [
        (1, "error"),
        (2, "warning"),
    ]


def test_the_format_can_be_said(tmp_path):
    turns = [{"from": "user", "value": "Say <image>."}, {"from": "assistant", "value": "a"}]
    file = tmp_path / "train.json"
    file.write_text(json.dumps([{"conversations": turns}]), encoding="utf-8")

    assert check([file]) == 1
    assert check([file], format="qwen_vl") == 0


def test_what_the_original_takes_is_no_error_to_a_run_that_learns_as_it_did(tmp_path, capsys):
    file = tmp_path / "train.json"
    turns = [{"from": "user", "value": "a"}, {"from": "user", "value": "b"}]
    file.write_text(json.dumps([{"conversations": [*turns, {"from": "assistant", "value": "c"}]}]))

    assert check([file]) == 1
    assert check([file], labels="reference") == 0


def test_pictures_are_decoded_where_that_is_asked(tmp_path):
    picture = tmp_path / "a.png"
    Image.effect_noise((64, 64), 90).save(picture)
    content = bytearray(picture.read_bytes())
    content[len(content) // 2] ^= 255
    picture.write_bytes(content)
    question = {"from": "user", "value": "<img>a.png</img>q"}
    file = tmp_path / "train.json"
    file.write_text(
        json.dumps([{"conversations": [question, {"from": "assistant", "value": "a"}]}])
    )

    assert check([file]) == 0
    assert check([file], decode=True) == 1


def test_warnings_alone_are_no_failure(faulty, capsys):
    values = json.loads(faulty.read_text())
    faulty.write_text(json.dumps([values[0], values[2]]))

    assert check([faulty]) == 0
    assert "2 records: 0 errors, 1 warning" in capsys.readouterr().out


def test_a_limit_without_a_model_is_said_to_be_unchecked(faulty, capsys):
    check([faulty], max_length=10)

    assert "lengths were not checked" in capsys.readouterr().out


def test_text_that_no_terminal_takes_is_printed_all_the_same(tmp_path, capsys):
    file = tmp_path / "a.json"
    file.write_text('[{"id": "\\ud800", "conversations": [{"from": "\\ud800", "value": "q"}]}]')

    assert check([file]) == 1
    assert "(id ?)" in capsys.readouterr().out


def test_with_a_model_its_tokens_are_counted(faulty, tmp_path, qwen_vocabulary, capsys):
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(GOLDEN / "model_tiny_small" / "config.json", model)
    shutil.copy(qwen_vocabulary, model)

    assert check([faulty], model=str(model), max_length=20, too_long="drop") == 1

    out = capsys.readouterr().out
    assert "warning: too long (2)" in out
    assert "3 records: 1 error, 3 warnings, 2 dropped records" in out


def test_an_error_about_a_report_that_nobody_saw_lists_its_findings(tmp_path: Path):
    file = tmp_path / "none.json"
    report = check_files([file])

    with pytest.raises(VltrainError, match="1 error, listed above") as seen:
        refuse_errors(report, [file], undone="trained")
    with pytest.raises(VltrainError, match="1 error, listed below") as unseen:
        refuse_errors(report, [file], undone="trained", printed=False)

    assert "cannot be read" not in str(seen.value)
    assert str(unseen.value).count("none.json cannot be read") == 1
