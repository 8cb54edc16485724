"""A message as a list and as text, held against what the original's tokenizer gives."""

import json
from pathlib import Path

import pytest

from vltrain.errors import VltrainError
from vltrain.models.qwen_vl.list_format import from_list_format, to_list_format

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"
FROM = json.loads((GOLDEN / "from_list_format.json").read_text())["cases"]
TO = json.loads((GOLDEN / "to_list_format.json").read_text())


@pytest.mark.parametrize("case", FROM, ids=range(len(FROM)))
def test_a_list_has_the_text_of_the_original(case):
    expected = case["chat_rev"]

    if "error" in expected:
        with pytest.raises(VltrainError, match=r"element 0: .*not supported"):
            from_list_format(case["input"])
    else:
        assert from_list_format(case["input"]) == expected["result"]


@pytest.mark.parametrize("case", TO, ids=range(len(TO)))
def test_a_text_has_the_elements_of_the_original(case):
    assert to_list_format(case["input"]) == case["out"]["result"]


def test_text_around_elements_is_kept_and_composed():
    text = "Picture 1: <img>a.png</img>\nCafe\u0301 <quad>(1,2),(3,4),(5,6),(7,8)</quad>!"

    assert to_list_format(text) == [
        {"text": "Picture 1: "},
        {"image": "a.png"},
        {"text": "\nCafé "},
        {"quad": "(1,2),(3,4),(5,6),(7,8)"},
        {"text": "!"},
    ]


def test_a_tag_that_is_not_closed_is_refused_with_its_place():
    with pytest.raises(VltrainError, match="character 2: <ref> is not closed"):
        to_list_format("a <ref>b<box>(1,2),(3,4)</box>")


@pytest.mark.parametrize("box", [[1, 2, 3], "(1,2),(3,4)", [1, 2, None, 4], 5])
def test_a_box_that_is_not_four_numbers_is_refused(box):
    with pytest.raises(VltrainError, match=r"element 1: .*not a box of four numbers"):
        from_list_format([{"text": "a"}, {"box": [box]}])
