"""The files under data_examples/: each is read as the same conversations in Qwen-VL form."""

from pathlib import Path

import pytest
import torch
from letters import LetterProcessor, record

from vltrain.data.checks import check_files
from vltrain.data.dataset import SampleDataset
from vltrain.data.formats import format_of
from vltrain.data.records import Record
from vltrain.data.sources import read_records

EXAMPLES = Path(__file__).parents[2] / "data_examples"
LETTERS = LetterProcessor()
CLOCK = "<img>images/clock.png</img>"
HOUSE = "<img>images/house.png</img>"
SHAPES = "<img>images/shapes.png</img>"


def with_system(system, *values):
    value = record(*values)
    value["conversations"].insert(0, {"from": "system", "value": system})
    return value


def openai():
    """The first record of messages.jsonl, whose first answer is shown and not learned."""
    value = with_system(
        "You answer in one sentence.",
        f"Picture 1: {CLOCK}\nWhat time is it?",
        "I do not know.",
        "Look at the hands.",
        "It is three o'clock.",
    )
    value["conversations"][2]["weight"] = 0
    return value


IN_QWEN_VL_FORM = {
    "messages.jsonl": [
        openai(),
        record(f"{SHAPES}{HOUSE}In which picture is something written?", "In the second."),
        record(f"{HOUSE}What does the sign say?", "OPEN."),
        record("Name a prime number.", "Seven."),
    ],
    "role_content.json": [
        record(f"Picture 1: {CLOCK}\nWhat colour is the face?", "White."),
        record(f"{HOUSE}Where is the door?", "<ref>The door</ref><box>(450,600),(600,850)</box>"),
        with_system("Be brief.", "一年有几个季节？", "四个。"),
    ],
    "llava.json": [
        record(
            f"{CLOCK}\nWhat time is it?",
            "It is three o'clock.",
            "How many hands has the clock?",
            "Two.",
        ),
        record(f"What does the sign say?\n{HOUSE}", "OPEN."),
        record("What is the capital of France?", "Paris."),
    ],
    "sharegpt.json": [
        with_system(
            "You compare pictures.",
            f"Picture 1: {SHAPES}\nPicture 2: {HOUSE}\nIn which is something written?",
            "In the second.",
            f"And here? {CLOCK}",
            "No.",
        ),
        record(f"{HOUSE}What is written on the sign?", "OPEN."),
        with_system("Be brief.", "Name a prime number.", "Seven."),
    ],
    "swift.jsonl": [
        with_system(
            "You answer in one word.",
            "Name a prime number.",
            "Seven.",
            f"{HOUSE}What does the sign say?",
            "OPEN.",
        ),
        record(
            f"{SHAPES}\nWhere is the <ref>red circle</ref>, where the <ref>blue square</ref>?",
            "<ref>red circle</ref><box>(100,250),(400,625)</box> "
            "<ref>blue square</ref><box>(600,375),(900,750)</box>",
        ),
        record(f"{HOUSE}\nFind the door.", "<ref>the door</ref><box>(450,600),(600,850)</box>"),
        record("一年有几个季节？", "四个。"),
    ],
    "pictures.parquet": [
        with_system("Be brief.", f"{CLOCK}What time is it?", "Three o'clock."),
        record(f"{SHAPES}{HOUSE}In which picture is a door?", "In the second."),
        record("一周有几天？", "七天。"),
    ],
    "shards": [
        record(f"{HOUSE}\nWhat does the sign say?", "OPEN."),
        record("Name a planet.", "Mars."),
        record(
            f"{SHAPES}{CLOCK}\nIn which picture is a circle?",
            "In both.",
            "Is one red?",
            "Yes, in the first.",
        ),
    ],
    "saved": [
        record(f"{HOUSE}Where is the door?", "<ref>The door</ref><box>(450,600),(600,850)</box>"),
        record("What is the capital of Japan?", "Tokyo."),
    ],
    "saved:test": [record(f"{CLOCK}What colour is the face?", "White.")],
}


@pytest.mark.parametrize("policy", ["assistant", "reference"])
@pytest.mark.parametrize("name", IN_QWEN_VL_FORM)
def test_an_example_is_encoded_as_the_same_conversations_in_qwen_vl_form(name, policy):
    values = IN_QWEN_VL_FORM[name]
    expected = [Record(EXAMPLES / name, index, value) for index, value in enumerate(values)]

    told = SampleDataset.of_records(read_records(EXAMPLES / name), LETTERS, labels=policy)
    known = SampleDataset.of_records(expected, LETTERS, labels=policy, format="qwen_vl")

    assert len(told) == len(known)
    for ours, theirs in zip(told, known, strict=True):
        assert ours["input_ids"] == theirs["input_ids"]
        assert ours["labels"] == theirs["labels"]
        assert ("pixel_values" in ours) == ("pixel_values" in theirs)
        if "pixel_values" in ours:
            assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("conversations.json", ["qwen_vl"] * 6),
        ("grounding.json", ["qwen_vl"] * 5),
        ("messages.jsonl", ["messages"] * 4),
        ("role_content.json", ["qwen_vl", "messages", "qwen_vl"]),
        ("llava.json", ["llava", "llava", "qwen_vl"]),
        ("sharegpt.json", ["llava", "llava", "qwen_vl"]),
        ("swift.jsonl", ["swift"] * 4),
        ("pictures.parquet", ["messages"] * 3),
        ("shards", ["llava", "qwen_vl", "llava"]),
        ("saved", ["llava", "qwen_vl"]),
        ("saved:test", ["llava"]),
    ],
)
def test_the_format_of_an_example_is_told_by_its_content(name, formats):
    assert [format_of(record.value) for record in read_records(EXAMPLES / name)] == formats


def test_every_example_is_clean():
    files = sorted(path for path in EXAMPLES.iterdir() if path.name != "images")

    report = check_files(files, processor=LETTERS, max_length=400)

    assert report.findings == ()
    assert len(files) == 11
    assert report.records >= 3 * len(files)
