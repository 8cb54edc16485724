"""Answering a file: which turns are asked, what the model is shown, what is written."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import IMAGE_START_ID, write_qwen_vl

from vltrain.config import FreezeConfig
from vltrain.data.conversation import ImagePart
from vltrain.data.pictures import LOCAL_PICTURES, Pictures
from vltrain.errors import VltrainError
from vltrain.evaluation.generation import Decoding
from vltrain.models import load_model, load_processor
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.catalog import QWEN_VL
from vltrain.models.fingerprint import weights_hash
from vltrain.models.saving import Origin, save_adapter
from vltrain.workflows.chat import answer_file, content_hash, prompt_of, read_questions
from vltrain.workflows.merge import merge

SYSTEM = b"\x01system\nYou are a helpful assistant.\x02\n"  # 1 and 2 stand for the turn's marks


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def turn(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


def write_data(folder: Path, *conversations: list[dict[str, str]]) -> Path:
    records = [{"id": f"r{i}", "conversations": turns} for i, turns in enumerate(conversations)]
    file = folder / "questions.json"
    file.write_text(json.dumps(records))
    return file


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def ids(layout: bytes) -> list[int]:
    """Bytes as ids of the toy vocabulary; 1 is <|im_start|>, 2 is <|im_end|>."""
    return [{1: 257, 2: 258}.get(byte, byte) for byte in layout]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    return write_data(
        tmp_path,
        [turn("user", "one"), turn("assistant", "1"), turn("user", "two"), turn("gpt", "2")],
        [turn("assistant", "hello"), turn("human", "<img>red.png</img>c?"), turn("assistant", "")],
        [turn("system", "Be brief."), turn("user", "你好"), turn("assistant", "好")],
    )


def test_every_assistant_turn_is_asked_under_its_place_in_the_file(data: Path, console: Console):
    asked = [
        (q.record.index, q.turn, q.expected) for q in read_questions(data, LOCAL_PICTURES, console)
    ]

    assert asked == [(0, 1, "1"), (0, 3, "2"), (1, 0, "hello"), (1, 2, ""), (2, 2, "好")]


def test_a_prompt_has_the_earlier_turns_as_the_file_has_them(
    data: Path, model: Path, console: Console
):
    processor = load_processor(model)
    questions = read_questions(data, LOCAL_PICTURES, console)

    prompts = [prompt_of(question, processor, LOCAL_PICTURES).input_ids for question in questions]

    picture = [IMAGE_START_ID, *[IMAGE_START_ID + 2] * 4, IMAGE_START_ID + 1]
    assert prompts[0] == ids(SYSTEM + b"\x01user\none\x02\n\x01assistant\n")
    assert prompts[1] == ids(
        SYSTEM + b"\x01user\none\x02\n\x01assistant\n1\x02\n\x01user\ntwo\x02\n\x01assistant\n"
    )
    assert prompts[2] == ids(SYSTEM + b"\x01assistant\n")
    assert prompts[3] == [
        *ids(SYSTEM + b"\x01user\n"),
        *picture,
        *ids(b"c?\x02\n\x01assistant\n"),
    ]
    assert prompts[4] == ids(
        b"\x01system\nBe brief.\x02\n\x01user\n" + "你好".encode() + b"\x02\n\x01assistant\n"
    )


def test_questions_of_other_formats_are_asked_too(tmp_path: Path, model: Path, console: Console):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    part = {"type": "image", "path": "red.png"}
    values = [
        {"system": "S", "query": "<image>q", "response": "a", "images": ["red.png"]},
        {
            "messages": [
                {"role": "user", "content": [part, {"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "b", "weight": 0},
            ]
        },
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, values)))

    questions = read_questions(file, LOCAL_PICTURES, console)

    assert [(q.record.index, q.turn, q.expected) for q in questions] == [(0, 1, "a"), (1, 1, "b")]
    picture = [IMAGE_START_ID, *[IMAGE_START_ID + 2] * 4, IMAGE_START_ID + 1]
    prompt = prompt_of(questions[0], load_processor(model), LOCAL_PICTURES)
    assert prompt.input_ids == [
        *ids(b"\x01system\nS\x02\n\x01user\n"),
        *picture,
        *ids(b"q\x02\n\x01assistant\n"),
    ]
    assert prompt.load_pixels().shape == (1, 3, 56, 56)


def test_a_prompts_pictures_are_those_of_the_turns_before_it(
    data: Path, model: Path, console: Console
):
    processor = load_processor(model)
    before, _, opening, with_picture, _ = read_questions(data, LOCAL_PICTURES, console)

    assert prompt_of(before, processor, LOCAL_PICTURES).load_pixels is None
    assert prompt_of(opening, processor, LOCAL_PICTURES).load_pixels is None
    pixels = prompt_of(with_picture, processor, LOCAL_PICTURES).load_pixels()
    assert pixels.shape == (1, 3, 56, 56)
    assert torch.allclose(pixels[0, 0], torch.tensor((1 - 0.48145466) / 0.26862954))


def test_the_output_has_one_object_for_each_assistant_turn(
    data: Path, model: Path, console: Console
):
    output = data.parent / "deep" / "answers.jsonl"

    answer_file(str(model), data, output, decoding=Decoding(3), console=console)

    written = rows(output)
    assert [list(row) for row in written] == [["record", "turn", "id", "answer", "expected"]] * 5
    assert [(row["record"], row["turn"], row["id"]) for row in written] == [
        (0, 1, "r0"),
        (0, 3, "r0"),
        (1, 0, "r1"),
        (1, 2, "r1"),
        (2, 2, "r2"),
    ]
    assert [row["expected"] for row in written] == ["1", "2", "hello", "", "好"]
    assert "done: 5 answers" in console.file.getvalue()
    assert [file.name for file in output.parent.iterdir()] == ["answers.jsonl"]


def stored(file: Path, *questions: str) -> None:
    """Write questions about a picture as Parquet, with the picture's bytes in every row."""
    picture = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(picture, "PNG")
    turns = [[{"from": "user", "value": q}, {"from": "gpt", "value": ""}] for q in questions]
    columns = {"id": list(questions), "image": [picture.getvalue()] * len(questions)}
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns | {"conversations": turns}), file)


def test_a_folder_of_parquet_is_answered_with_each_rows_file(
    tmp_path: Path, model: Path, console: Console
):
    folder = tmp_path / "shards"
    stored(folder / "a.parquet", "<image>one", "<image>two")
    stored(folder / "b.parquet", "<image>three")

    answer_file(str(model), folder, tmp_path / "a.jsonl", decoding=Decoding(1), console=console)

    assert [(row["file"], row["record"], row["id"]) for row in rows(tmp_path / "a.jsonl")] == [
        (str(folder / "a.parquet"), 0, "<image>one"),
        (str(folder / "a.parquet"), 1, "<image>two"),
        (str(folder / "b.parquet"), 0, "<image>three"),
    ]


def test_answers_to_questions_that_have_changed_are_not_kept(tmp_path: Path, console: Console):
    asked = []
    for text in ("<image>one", "<image>one", "<image>two"):
        stored(tmp_path / "a.parquet", text)
        questions = read_questions(tmp_path / "a.parquet", LOCAL_PICTURES, console)
        asked.append(content_hash(question.record for question in questions))

    assert asked[0] == asked[1] != asked[2]


def test_questions_are_read_in_the_format_that_is_set(tmp_path: Path, console: Console):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    said = [turn("user", "<img>red.png</img>q"), turn("assistant", "a")]
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([{"messages": said}]))

    with pytest.raises(VltrainError, match="1 error"):
        read_questions(file, LOCAL_PICTURES, console)
    (question,) = read_questions(file, LOCAL_PICTURES, console, format="qwen_vl")
    assert ImagePart("red.png") in question.before[0].parts


def cut_off_after(answers: int, whole: Path, task: dict[str, Any], draft: Path) -> None:
    """The draft of a run that was killed while it wrote the answer after so many."""
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    first = json.dumps({"task": task}, ensure_ascii=False) + "\n"
    draft.write_text(first + "".join(lines[:answers]) + lines[answers][:20], encoding="utf-8")


@pytest.fixture
def task_of_a_killed_run(
    data: Path, model: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """What the first line of a draft says, from a run that broke off before its end."""
    with monkeypatch.context() as patch:
        patch.setattr("vltrain.workflows.chat.write_without_first_line", _killed)
        with pytest.raises(KeyboardInterrupt):
            answer_file(
                str(model), data, data.parent / "a.jsonl", decoding=Decoding(3), console=console
            )
    draft = data.parent / "a.jsonl.partial"
    return json.loads(draft.read_text(encoding="utf-8").splitlines()[0])["task"]


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_run_that_was_cut_off_goes_on_behind_its_last_whole_answer(
    data: Path, model: Path, console: Console, task_of_a_killed_run: dict[str, Any]
):
    output = data.parent / "a.jsonl"
    draft = data.parent / "a.jsonl.partial"
    answer_file(
        str(model), data, data.parent / "whole.jsonl", decoding=Decoding(3), console=console
    )
    marked = (data.parent / "whole.jsonl").read_text(encoding="utf-8")
    cut_off_after(2, data.parent / "whole.jsonl", task_of_a_killed_run, draft)

    answer_file(str(model), data, output, decoding=Decoding(3), console=console)

    assert "going on behind 2 answers" in console.file.getvalue()
    assert output.read_text(encoding="utf-8") == marked
    assert not draft.exists()


def test_answers_to_another_task_are_not_kept(
    data: Path, model: Path, console: Console, task_of_a_killed_run: dict[str, Any]
):
    output = data.parent / "a.jsonl"

    answer_file(str(model), data, output, decoding=Decoding(2), console=console)

    assert "going on" not in console.file.getvalue()
    assert len(rows(output)) == 5


def test_an_adapter_answers_like_the_model_that_it_merges_into(
    data: Path, model: Path, console: Console, tmp_path: Path
):
    adapted = add_lora(load_model(model), QWEN_VL, FreezeConfig(), Adapter(r=4), seed=1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.05)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(adapted, Origin(str(model), model, None, weights_hash(model)), adapter)
    merge(adapter, tmp_path / "merged", console=console)

    answers = {}
    for name in ("adapter", "merged", str(model)):
        output = tmp_path / f"{Path(name).name}.jsonl"
        answer_file(str(tmp_path / name), data, output, decoding=Decoding(5), console=console)
        answers[name] = [row["answer"] for row in rows(output)]
    assert answers["adapter"] == answers["merged"] != answers[str(model)]


def test_an_older_output_is_replaced(data: Path, model: Path, console: Console):
    output = data.parent / "answers.jsonl"
    output.write_text("of another day\n")

    answer_file(str(model), data, output, decoding=Decoding(1), console=console)

    assert len(rows(output)) == 5


def test_half_a_surrogate_pair_comes_back_as_its_escape(
    tmp_path: Path, model: Path, console: Console
):
    data = write_data(tmp_path, [turn("user", "x"), turn("assistant", "\ud800")])
    output = tmp_path / "answers.jsonl"

    answer_file(str(model), data, output, decoding=Decoding(1), console=console)

    assert rows(output)[0]["expected"] == "\ud800"


def test_missing_pictures_are_told_before_a_model_is_loaded(tmp_path: Path, console: Console):
    data = write_data(
        tmp_path,
        [turn("user", "<img>gone.png</img>a"), turn("assistant", "a")],
        [turn("user", "<img>lost.png</img>b"), turn("assistant", "b")],
    )

    with pytest.raises(VltrainError, match="2 errors, listed above; nothing was asked"):
        answer_file("no-such-model", data, tmp_path / "answers.jsonl", console=console)

    told = console.file.getvalue()
    assert "gone.png" in told
    assert "lost.png" in told


def test_pictures_are_looked_up_under_the_image_root(tmp_path: Path, model: Path, console: Console):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "a.png")
    data = write_data(tmp_path, [turn("user", "<img>a.png</img>a"), turn("assistant", "a")])
    output = tmp_path / "answers.jsonl"

    answer_file(
        str(model), data, output, decoding=Decoding(1), pictures=Pictures(pictures), console=console
    )

    assert len(rows(output)) == 1


def test_a_file_without_assistant_turns_has_nothing_to_answer(tmp_path: Path, console: Console):
    data = write_data(tmp_path, [turn("user", "a")])

    with pytest.raises(VltrainError, match="nothing"):
        read_questions(data, LOCAL_PICTURES, console)


def test_ids_that_the_model_lacks_are_refused_by_record(data: Path, model: Path, console: Console):
    config = json.loads((model / "config.json").read_text())
    smaller = data.parent / "smaller"
    write_qwen_vl(smaller)
    config["vocab_size"] = 300  # <img> and its kin lie above
    (smaller / "config.json").write_text(json.dumps(config))
    tensors = load_file(smaller / "model.safetensors")
    for name in ("transformer.wte.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:300].contiguous()
    save_file(tensors, smaller / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(VltrainError, match=r"questions.json#\d+: has the id 47\d"):
        answer_file(str(smaller), data, data.parent / "a.jsonl", console=console)
