"""A conversation in the terminal, line by line, as the command runs it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import write_conversations, write_qwen_vl
from typer.testing import CliRunner

import vltrain.workflows.terminal as terminal
from vltrain.cli import app
from vltrain.config import FreezeConfig
from vltrain.data.checks import check_files
from vltrain.errors import VltrainError
from vltrain.models import load_model, load_processor
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.catalog import QWEN_VL
from vltrain.models.fingerprint import weights_hash
from vltrain.models.saving import Origin, save_adapter

BOX = "<ref>猫</ref><box>(100,100),(500,500)</box>"
TAGS = {"<ref>": 464, "</ref>": 465, "<box>": 466, "</box>": 467}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("terminal") / "model")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with pictures in images/."""
    write_conversations(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ids_of(answer: str) -> list[int]:
    """An answer as ids of the toy vocabulary, with the end of its turn."""
    for number, tag in enumerate(TAGS):
        answer = answer.replace(tag, chr(0xE000 + number))
    tags = {chr(0xE000 + number): id_ for number, id_ in enumerate(TAGS.values())}
    return [i for c in answer for i in ([tags[c]] if c in tags else c.encode())] + [258]


@pytest.fixture
def says(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes the model say these answers, one after the other."""

    def prepare(*answers: str) -> None:
        model, processor = load_model(folder), load_processor(folder)
        ids = iter([token for answer in answers for token in ids_of(answer)])

        def speak(_module, _inputs, logits):
            forced = torch.full_like(logits, -1e4)
            forced[..., next(ids)] = 0
            return forced

        model.lm_head.register_forward_hook(speak)
        monkeypatch.setattr(terminal, "load_for_answers", lambda *_: (model, processor))

    return prepare


def talk(folder: Path, *lines: str, options: tuple[str, ...] = ()) -> str:
    """What a conversation prints."""
    typed = "".join(f"{line}\n" for line in lines)
    done = CliRunner().invoke(app, ["chat", str(folder), *options], input=typed)
    assert done.exception is None, done.exception
    return done.output


def test_questions_are_answered_until_the_lines_end(folder, says):
    says("one", "two 猫")

    said = talk(folder, "a", "", "b")

    assert said.splitlines()[1:] == ["> a", "one", "> ", "> b", "two 猫", "> "]


def test_quit_leaves(folder, says):
    says("never")

    assert "never" not in talk(folder, "/quit", "a")


def test_pictures_wait_for_the_next_question(folder, says):
    says("ok")

    said = talk(folder, "/image images/red.png", "/image 'images/blue.png'", "a", "/quit")

    assert said.splitlines()[1:] == [
        "> /image images/red.png",
        "[1 picture] > /image 'images/blue.png'",
        "[2 pictures] > a",
        "ok",
        "> /quit",
    ]


def test_boxes_are_drawn_on_the_last_picture(folder, says, place):
    says(BOX)

    said = talk(folder, "/image images/red.png", "where?", "/box out.png", "/box")

    assert "saved out.png" in said
    assert "saved boxes-1.png" in said
    with Image.open(place / "images" / "red.png") as before, Image.open("out.png") as after:
        assert after.size == before.size == (56, 56)
        assert after.getpixel((28, 20)) != before.getpixel((28, 20))  # the right edge, at 500


@pytest.mark.parametrize(
    ("answers", "lines", "fault"),
    [
        ((), ["/box"], "nothing has been answered yet"),
        (("no",), ["q", "/box"], "the last answer has no box"),
        (("<box>(1,2)</box>",), ["q", "/box"], "is not a box"),
        ((BOX,), ["q", "/box"], "no picture has been shown"),
        ((BOX,), ["/image images/red.png", "q", "/box images/red.png"], "is there already"),
        ((BOX,), ["/image images/red.png", "q", "/box a.txt"], "is no name of a picture"),
        ((BOX,), ["/image images/red.png", "q", "/box no/a.png"], "No such file"),
        ((), ["/image"], "no picture is named"),
        ((), ["/image gone.png"], "gone.png"),
        ((), ["/image train.json"], "train.json"),
        ((), ["/image https://localhost/a.png"], "--allow-urls"),
        ((), ["/imagine"], "/imagine: there is no such command"),
        ((), ["<ref>a"], "<ref> without its end"),
        ((), ["<img>gone.png</img>what?"], "gone.png"),
        ((), ["/save"], "no file is named"),
        ((), ["/save a.json"], "there is no conversation"),
        (("a",), ["q", "/save a.txt"], "is no name of a JSON file"),
        (("a",), ["q", "/save no/a.json"], "its folder is not there"),
        (("<ref>a",), ["q", "/save a.json"], "<ref> without its end"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(
    folder, says, answers, lines, fault
):
    says(*answers, "still here")

    said = talk(folder, *lines, "/reset", "again")

    assert fault in said
    assert said.splitlines()[-2:] == ["still here", "> "]


def test_a_saved_conversation_is_data_that_check_finds_nothing_in(folder, says, place):
    says("red", BOX, "bye")
    (place / "deep").mkdir()

    talk(folder, "/image images/red.png", "what?", "/save deep/a.json", "where?", "/save mine.json")

    (record,) = json.loads((place / "mine.json").read_text(encoding="utf-8"))
    assert [(turn["from"], turn["value"]) for turn in record["conversations"]] == [
        ("user", "Picture 1: <img>images/red.png</img>\nwhat?"),
        ("assistant", "red"),
        ("user", "where?"),
        ("assistant", BOX),
    ]
    (other,) = json.loads((place / "deep" / "a.json").read_text(encoding="utf-8"))
    assert f"<img>{place / 'images' / 'red.png'}</img>" in other["conversations"][0]["value"]
    assert check_files([place / "mine.json"]).findings == ()
    assert check_files([place / "deep" / "a.json"]).findings == ()


def test_saving_adds_to_a_file_and_replaces_its_own_record(folder, says):
    says("one", "two")

    said = talk(folder, "a", "/save train.json", "b", "/save train.json")

    records = json.loads(Path("train.json").read_text(encoding="utf-8"))
    assert [record["id"] for record in records[:4]] == ["r0", "r1", "r2", "r3"]
    assert len(records) == 5
    assert len(records[4]["conversations"]) == 4
    assert "saved 2 exchanges in train.json" in said


def test_a_conversation_that_begins_anew_is_saved_beside_the_one_before_it(folder, says):
    says("one", "two")

    talk(folder, "a", "/save new.json", "/reset", "b", "/save new.json")

    records = json.loads(Path("new.json").read_text(encoding="utf-8"))
    assert [record["conversations"][0]["value"] for record in records] == ["a", "b"]


def test_a_record_ends_before_an_answer_that_a_run_would_refuse(folder, says):
    says("one", "<box>(1,2)</box>", "three")

    said = talk(folder, "a", "b", "c", "/save new.json")

    (record,) = json.loads(Path("new.json").read_text(encoding="utf-8"))
    assert [turn["value"] for turn in record["conversations"]] == ["a", "one"]
    assert "saved 1 exchange in new.json" in said
    assert "is not a box" in said


def test_exchanges_without_room_are_left_out_and_that_is_said(folder, says):
    says("one", "two", "three")
    # the system turn has 37 tokens, an exchange 24 to 26
    said = talk(folder, "a", "b", "c", options=("--max-window-size", "70"))

    assert said.count("are left") == 1
    assert "the first 1 of the exchanges" in said
    assert said.splitlines()[-2] == "three"


def test_a_question_longer_than_the_window_is_refused_alone(folder, says):
    says("still here")

    said = talk(folder, "x" * 90, "short", options=("--max-window-size", "90"))

    assert "and the window is 90" in said
    assert "still here" in said


def test_control_characters_of_an_answer_do_not_reach_the_terminal(folder, says):
    says("a\x1b[31mb\x07")

    assert "a\ufffd[31mb\ufffd" in talk(folder, "q")


def test_a_completion_is_asked_without_turns(folder, says, monkeypatch):
    says("and so on\n", "")
    seen: list[list[int]] = []
    say = sys.modules["vltrain.workflows.talk"].say

    def listening(model, processor, prompt, *args, **named):
        seen.append(list(prompt.input_ids))
        return say(model, processor, prompt, *args, **named)

    monkeypatch.setattr("vltrain.workflows.talk.say", listening)

    talk(folder, "once", options=("--complete", "--max-new-tokens", "3"))

    assert seen == [[*b"once"]]


def test_one_question_is_answered_on_stdout(folder, says):
    says("a cat")
    words = ["chat", str(folder), "--prompt", "what?", "--image", "images/red.png"]

    done = CliRunner().invoke(app, words)

    assert done.exit_code == 0
    assert done.stdout == "a cat\n"


def test_bad_pictures_are_told_together_before_a_model_is_loaded():
    words = ["chat", "no-such-model", "--prompt", "q", "--image", "a.png", "--image", "b.png"]

    error = CliRunner().invoke(app, words).exception

    assert isinstance(error, VltrainError)
    assert "2 faults" in str(error)
    assert "a.png" in str(error)
    assert "b.png" in str(error)


@pytest.mark.parametrize(
    "words",
    [
        ("--input", "a.json"),
        ("--output", "a.jsonl"),
        ("--batch-size", "2"),
        ("--format", "llava", "--prompt", "q"),
        ("--input", "a.json", "--output", "b.jsonl", "--prompt", "q"),
        ("--input", "a.json", "--output", "b.jsonl", "--complete"),
    ],
)
def test_words_that_do_not_go_together_are_a_usage_error(words):
    assert CliRunner().invoke(app, ["chat", "model", *words]).exit_code == 2


def test_an_adapter_answers_on_its_base_and_as_a_folder(folder, tmp_path):
    adapted = add_lora(load_model(folder), QWEN_VL, FreezeConfig(), Adapter(r=4), seed=1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.05)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(adapted, Origin(str(folder), folder, None, weights_hash(folder)), adapter)
    short = ["--prompt", "q", "--max-new-tokens", "6"]

    def answer(*words: str) -> str:
        return CliRunner().invoke(app, ["chat", *words, *short]).stdout

    beside = answer(str(folder), "--adapter", str(adapter))
    assert beside == answer(str(adapter)) != answer(str(folder))
    twice = CliRunner().invoke(app, ["chat", str(adapter), "--adapter", str(adapter), *short])
    assert "is an adapter itself" in str(twice.exception)


def test_ctrl_c_stops_an_answer_and_not_the_conversation(folder, says, monkeypatch):
    says("never", "still here")
    say = sys.modules["vltrain.workflows.talk"].say
    stops = iter([True, False])

    def stopped_once(*args, **named):
        if next(stops):
            raise KeyboardInterrupt
        return say(*args, **named)

    monkeypatch.setattr("vltrain.workflows.talk.say", stopped_once)

    said = talk(folder, "/image images/red.png", "q", "/box")

    assert "stopped; what was not answered is forgotten" in said
    assert "[1 picture] > /box" in said  # it waits for the question that comes in its place
    assert "nothing has been answered yet" in said
