"""Text taken apart at its pictures, and what is wrong with its tags."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vltrain.data.conversation import ImagePart, TextPart
from vltrain.data.markup import joined, parts_of, prose_faults

WORDS = st.sampled_from(
    ["<img>", "</img>", "<ref>", "</ref>", "<box>", "</box>", "<|im_end|>", "<", "a", " ", "\n"]
)
TEXTS = st.lists(WORDS, max_size=8).map("".join)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "Picture 1:<img>a.png</img>\nq",
            [TextPart("Picture 1:"), ImagePart("a.png"), TextPart("\nq")],
        ),
        ("<img>a.png</img>q", [ImagePart("a.png"), TextPart("q")]),
        ("q <img>a.png</img>", [TextPart("q "), ImagePart("a.png")]),
        ("<img> my cat.png\n</img>q", [ImagePart("my cat.png"), TextPart("q")]),
        ("<img>a</img><img>b</img>", [ImagePart("a"), ImagePart("b")]),
        ("<IMG>a.png</IMG>", [TextPart("<IMG>a.png</IMG>")]),
        (" \n text\r\n ", [TextPart(" \n text\r\n ")]),
        (
            "<ref>x</ref><box>(1,2),(3,4)</box>",
            [TextPart("<ref>x</ref><box>(1,2),(3,4)</box>")],
        ),
        ("<img>a<|im_end|>.png</img>", [ImagePart("a<|im_end|>.png")]),
        ("<imgpad>", [TextPart("<imgpad>")]),
        ("", []),
    ],
)
def test_text_around_pictures_is_kept_byte_for_byte(text, parts):
    assert parts_of(text, "here") == (tuple(parts), [])


@given(TEXTS)
def test_no_byte_of_a_text_is_lost(text):
    parts, faults = parts_of(text, "here")
    if any(fault.grade == "unreadable" for fault in faults):
        return

    told = [p.text if isinstance(p, TextPart) else f"<img>{p.source}</img>" for p in parts]

    assert "".join("".join(told).split()) == "".join(text.split())


def test_texts_that_touch_are_one_text_and_empty_ones_are_none():
    parts = [
        TextPart("a"),
        TextPart(""),
        TextPart("b"),
        ImagePart("x"),
        TextPart(""),
        TextPart("c"),
    ]

    assert joined(parts) == (TextPart("ab"), ImagePart("x"), TextPart("c"))


@pytest.mark.parametrize("text", ["<img>a.png</img>", "an <img> tag", "</img>"])
def test_a_picture_tag_in_prose_is_refused(text):
    (fault,) = prose_faults(text, "turn 0 (user)")

    assert (fault.kind, fault.grade) == ("picture_markup", "unreadable")
    assert fault.message.startswith("turn 0 (user) has <")


def test_boxes_in_prose_must_pair_up():
    assert prose_faults("<ref>cat</ref><box>(1,2),(3,4)</box>", "here") == []
    assert [fault.kind for fault in prose_faults("<ref>cat", "here")] == ["unclosed_tag"]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("<ref>a<box>(1,2),(3,4)</box></ref>", ["nested_tag"]),
        ("<ref>a<box></ref>(1,2),(3,4)</box>", ["nested_tag"]),
        ("<ref>a<box>(1,2),(3,4)</box>", ["unclosed_tag"]),
        ("<img>a.png <ref>a</ref>", ["unclosed_tag"]),
        ("<img>a<img>b</img>", ["nested_tag"]),
        ("<ref>a<box>b", ["unclosed_tag", "unclosed_tag"]),
        ("</ref><ref>", ["stray_tag", "unclosed_tag"]),
    ],
)
def test_each_slip_of_a_tag_is_one_fault(text, kinds):
    parts, faults = parts_of(text, "here")

    assert [fault.kind for fault in faults] == kinds
    assert parts == (TextPart(text),)
