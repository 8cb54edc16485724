"""Which words reach the workflows that read, show, count and convert data."""

from pathlib import Path

import pytest
from command_line import type_in

from vltrain.data.coco import CATEGORY_QUESTION
from vltrain.data.pictures import Pictures
from vltrain.data.refcoco import EXPRESSION_QUESTION


def test_pictures_are_downloaded_only_if_a_word_says_so(called: list[tuple]):
    type_in("check", "a.json", "--image-root", "pics")
    type_in("check", "a.json", "--allow-urls")

    without, allowed = (named["pictures"] for _, _, named in called)
    assert without == Pictures(Path("pics"))
    assert allowed.downloads is not None
    assert not allowed.downloads.allow_private


@pytest.mark.parametrize(
    "words",
    [
        ("check", "a.json"),
        ("stats", "a.json", "--model", "base"),
        ("preview", "a.json", "--model", "base", "-o", "p.html"),
        ("chat", "base", "--input", "a.json", "--output", "b.jsonl"),
    ],
    ids=lambda words: words[0],
)
def test_what_reads_data_takes_its_format(called: list[tuple], words: tuple[str, ...]):
    type_in(*words, "--format", "swift")

    assert called[0][2]["format"] == "swift"


def test_convert_reads_annotations_of_three_kinds(called: list[tuple]):
    type_in("convert", "coco", "a.json", "-o", "t.json", "--images", "pictures")
    type_in("convert", "refcoco", "a.json", "--output", "t.json")
    type_in("convert", "llava", "a.json", "-o", "t.json")

    files = (Path("a.json"), Path("t.json"))
    assert called == [
        (
            "convert_coco_file",
            files,
            {"images": Path("pictures"), "question": CATEGORY_QUESTION},
        ),
        (
            "convert_refcoco_file",
            files,
            {
                "images": None,
                "boxes": "xywh",
                "splits": (),
                "instances": None,
                "question": EXPRESSION_QUESTION,
            },
        ),
        ("convert_llava_file", files, {"images": None}),
    ]


def test_convert_takes_the_form_of_boxes_splits_and_a_question(called: list[tuple]):
    type_in(
        *("convert", "refcoco", "a.json", "-o", "t.json", "--boxes", "xyxy", "--split", "train"),
        *("--split", "val", "--instances", "i.json", "--question", "Find {expression}."),
    )

    assert called[0][2] == {
        "images": None,
        "boxes": "xyxy",
        "splits": ["train", "val"],
        "instances": Path("i.json"),
        "question": "Find {expression}.",
    }


@pytest.mark.parametrize("words", [("coco", "a.json"), ("coco", "-o", "t.json"), ("voc", "a.xml")])
def test_convert_without_its_words_is_a_usage_error(called: list[tuple], words: tuple[str, ...]):
    assert type_in("convert", *words) == 2
    assert called == []


def test_demo_writes_or_scores(called: list[tuple]):
    type_in("demo", "demo")
    type_in("demo", "demo", "--score")

    assert called == [("write_demo", (Path("demo"),), {}), ("score_demo", (Path("demo"),), {})]


def test_preview_gets_data_model_page_and_choice(called: list[tuple]):
    type_in("preview", "a.json", "b.json", "--model", "base", "-o", "p.html", "--samples", "3")

    named = {
        "model": "base",
        "samples": 3,
        "seed": 0,
        "format": "auto",
        "labels": "assistant",
        "pictures": Pictures(),
        "max_length": None,
    }
    assert called == [("preview", ([Path("a.json"), Path("b.json")], Path("p.html")), named)]


def test_stats_gets_data_model_and_limit(called: list[tuple]):
    type_in("stats", "a.json", "--model", "base", "--max-length", "64", "--json")

    named = {
        "model": "base",
        "format": "auto",
        "labels": "assistant",
        "pictures": Pictures(),
        "max_length": 64,
        "as_json": True,
    }
    assert called == [("stats", ([Path("a.json")],), named)]


@pytest.mark.parametrize("words", [("preview", "a.json", "-o", "p.html"), ("stats", "a.json")])
def test_counting_tokens_without_a_model_is_a_usage_error(called: list[tuple], words):
    assert type_in(*words) == 2
    assert called == []
