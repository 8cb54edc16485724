"""The script of a text is that of most of its words."""

import pytest

from vltrain.data.scripts import script_of


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Where is the cat?", "Latin"),
        ("Où est le château ?", "Latin"),
        ("图里有什么？", "Chinese"),
        ("これは猫です", "Japanese"),
        ("猫が東京駅前広場", "Japanese"),
        ("이것은 고양이입니다", "Korean"),
        ("Где кошка?", "Cyrillic"),
        ("Πού είναι η γάτα;", "Greek"),
        ("أين القطة؟", "Arabic"),
        ("איפה החתול", "Hebrew"),
        ("बिल्ली कहाँ है", "Devanagari"),
        ("แมวอยู่ที่ไหน", "Thai"),
        ("ካት የት", "other"),
        ("(12, 5) + 7!", "none"),
        ("", "none"),
        ("OpenAI 发布了一个新的模型", "Chinese"),
    ],
)
def test_a_text_has_the_script_of_most_of_its_words(text: str, script: str):
    assert script_of(text) == script


def test_what_the_format_writes_is_no_language():
    text = "Picture 1: \n在哪里？<ref>猫</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>"

    assert script_of(text) == "Chinese"
