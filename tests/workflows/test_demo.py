import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from vltrain.errors import VltrainError
from vltrain.models import load_model, load_processor
from vltrain.workflows.demo import read_scored, score_demo, write_demo

BOX = "<ref>7</ref><box>(100,100),(500,500)</box>"
HALF_OF_BOX = "<ref>7</ref><box>(100,100),(300,500)</box>"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(folder)
    return folder


@pytest.fixture
def answered(tmp_path) -> Path:
    """A folder with two held-out records, answered badly by the base and well by the merged."""
    Image.new("RGB", (112, 112), "white").save(tmp_path / "a.png")
    heldout = [
        _record("0:single+point", [("Which digit?", "7"), ("Where is the 7?", BOX)]),
        _record("1:count", [("How many?", "1")]),
    ]
    (tmp_path / "heldout.json").write_text(json.dumps(heldout))
    _write_answers(tmp_path / "base_answers.jsonl", ["1", HALF_OF_BOX, "2"])
    _write_answers(tmp_path / "merged_answers.jsonl", ["7", BOX, " 1 "])
    return tmp_path


def _record(name: str, exchanges: list[tuple[str, str]]) -> dict:
    turns = []
    for question, answer in exchanges:
        picture = "" if turns else "Picture 1: <img>a.png</img>\n"
        turns.append({"from": "user", "value": picture + question})
        turns.append({"from": "assistant", "value": answer})
    return {"id": name, "conversations": turns}


def _write_answers(path: Path, answers: list[str]) -> None:
    places = [(0, 1), (0, 3), (1, 1)]
    rows = [
        {"record": record, "turn": turn, "answer": answer}
        for (record, turn), answer in zip(places, answers, strict=True)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))


def _printed(folder: Path) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        score_demo(folder, console)
    return capture.get()


def test_an_answer_with_a_line_separator_of_its_own_is_one_answer(answered):
    row = {"record": 0, "turn": 1, "answer": "7\u2028\x85"}
    rest = (answered / "base_answers.jsonl").read_text().partition("\n")[2]
    text = json.dumps(row, ensure_ascii=False) + "\n" + rest
    (answered / "base_answers.jsonl").write_text(text, encoding="utf-8")

    assert read_scored(answered)[0].before == "7\u2028\x85"


@pytest.mark.slow
def test_the_base_of_the_demo_is_small_and_loads(demo):
    model = load_model(demo / "model")
    processor = load_processor(demo / "model")

    assert (demo / "model" / "model.safetensors").stat().st_size < 6e6
    assert model.config.vocab_size == len(processor.tokenizer) == 768


@pytest.mark.slow
def test_every_picture_that_a_record_names_is_written(demo):
    for name in ("train.json", "heldout.json"):
        text = (demo / name).read_text(encoding="utf-8")
        for part in text.split("<img>")[1:]:
            assert (demo / part.split("</img>")[0]).is_file()


@pytest.mark.slow
def test_no_picture_file_of_the_held_out_records_is_one_of_training(demo):
    hashes = {
        split: {
            hashlib.sha256(file.read_bytes()).hexdigest()
            for file in (demo / "images").glob(f"{split}-*.png")
        }
        for split in ("train", "heldout")
    }

    assert len(hashes["heldout"]) > 300
    assert not hashes["train"] & hashes["heldout"]


@pytest.mark.slow
def test_a_demo_that_is_there_is_left_alone(demo):
    before = (demo / "train.json").stat().st_mtime_ns

    console = Console(width=200)
    with console.capture() as capture:
        write_demo(demo, console)

    assert "already" in capture.get()
    assert (demo / "train.json").stat().st_mtime_ns == before


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("my life's work")

    with pytest.raises(VltrainError, match=r"thesis\.tex.*\n.*new or empty"):
        write_demo(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "demo").write_text("")

    with pytest.raises(VltrainError, match="is a file"):
        write_demo(tmp_path / "demo")


def test_each_question_is_scored_by_its_kind(answered):
    single, point, count = read_scored(answered)

    assert [item.kind for item in (single, point, count)] == ["single", "point", "count"]
    assert (single.score(single.before), single.score(single.after)) == (0, 1)
    assert (point.score(point.before), point.score(point.after)) == (0.5, 1)
    assert count.score(count.after) == 1  # blanks around an answer do not count


def test_the_scores_before_and_after_are_shown_with_what_became_of_the_wrong_answers(answered):
    shown = _printed(answered)

    assert "2 of 2 texts were wrong before, 0 are after: 100% fewer" in shown
    assert "0.50" in shown
    assert "100.0%" in shown


def test_answered_boxes_are_drawn(answered):
    _printed(answered)

    with Image.open(answered / "boxes.png") as sheet:
        assert len(sheet.crop((0, 0, 336, 336)).getcolors(maxcolors=100_000)) > 1


def test_scoring_without_answers_says_how_to_get_them(answered):
    (answered / "merged_answers.jsonl").unlink()

    with pytest.raises(VltrainError, match="vltrain chat MODEL --input"):
        score_demo(answered)


def test_answers_to_another_file_are_refused(answered):
    (answered / "base_answers.jsonl").write_text('{"record": 9, "turn": 1, "answer": "7"}')

    with pytest.raises(VltrainError, match=r"heldout\.json#0 are missing"):
        read_scored(answered)
