"""Boxes in text, read and drawn."""

import logging
from pathlib import Path

import matplotlib.font_manager
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from vltrain.data.grounding import (
    Box,
    draw_boxes,
    label_font,
    parse_boxes,
    read_boxes,
    wide_font_file,
)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("", []),
        ("no box", []),
        ("<ref>the cat</ref><box>(12,34),(567,890)</box>", [Box(12, 34, 567, 890, "the cat")]),
        ("<ref> padded </ref><box>(1,2),(3,4)</box>", [Box(1, 2, 3, 4, "padded")]),
        ("<box>( 1, 2), (3 ,4)</box>", [Box(1, 2, 3, 4)]),
        ("<ref>x</ref> gap <box>(1,2),(3,4)</box>", [Box(1, 2, 3, 4)]),
        (
            "<ref>people</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>",
            [Box(1, 2, 3, 4, "people"), Box(5, 6, 7, 8, "people")],
        ),
        (
            "<ref>a</ref><box>(1,2),(3,4)</box> and <box>(5,6),(7,8)</box>",
            [Box(1, 2, 3, 4, "a"), Box(5, 6, 7, 8)],
        ),
        ("<quad>(1,2),(3,4),(5,6),(7,8)</quad>", []),
        ("<box>(0,0),(999,1000)</box>", [Box(0, 0, 999, 1000)]),
    ],
)
def test_boxes_are_read_with_their_refs(text, boxes):
    assert parse_boxes(text) == (boxes, [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<box></box>", "<box></box> is not a box"),
        ("<box>(1,2),(3)</box>", "<box>(1,2),(3)</box> is not a box"),
        ("<box>(0.1,0.2),(0.3,0.4)</box>", "<box>(0.1,0.2),(0.3,0.4)</box> is not a box"),
        ("<box>(-1,2),(3,4)</box>", "<box>(-1,2),(3,4)</box> leaves the range [0, 1000)"),
        ("<box>(1,2),(3,1001)</box>", "<box>(1,2),(3,1001)</box> leaves the range [0, 1000)"),
        (
            "<box>(5,2),(3,4)</box>",
            "<box>(5,2),(3,4)</box> is inverted: its second corner is left of or above its first",
        ),
        ("<box>(1,2),(3,4)", "<box> does not pair up"),
        ("</ref>", "</ref> does not pair up"),
    ],
)
def test_a_box_that_cannot_be_read_is_no_box_and_a_reason(text, reason):
    assert parse_boxes(text) == ([], [reason])


@pytest.mark.parametrize(
    ("text", "kind", "grade"),
    [
        ("<box>(1,2)</box>", "malformed_box", "unreadable"),
        ("<box>(1,2),(3,2000)</box>", "box_out_of_range", "unreadable"),
        ("<box>(1,20),(3,4)</box>", "inverted_box", "unreadable"),
        ("<box>(1,2),(1000,4)</box>", "box_at_1000", "warning"),
        ("<quad>(1,2),(3,4)</quad>", "malformed_box", "unreadable"),
        ("<quad>(1,2),(3,4),(5,6),(7,2000)</quad>", "box_out_of_range", "unreadable"),
    ],
)
def test_each_kind_of_bad_box_has_its_name(text, kind, grade):
    assert [(fault.kind, fault.grade) for fault in read_boxes(text)[1]] == [(kind, grade)]


def test_a_box_in_pixels_follows_the_pictures_size():
    assert Box(0, 250, 500, 1000).in_pixels(width=400, height=200) == (0, 50, 200, 200)


def test_boxes_are_drawn_where_they_are_and_the_picture_is_left_alone():
    image = Image.new("RGB", (200, 100), "white")

    drawn = draw_boxes(image, "<box>(250,200),(750,800)</box>")

    assert ImageChops.difference(image, drawn).getbbox() == (50, 20, 151, 81)
    assert image.getcolors() == [(20000, (255, 255, 255))]
    assert drawn.getpixel((100, 50)) == (255, 255, 255)


def test_a_ref_is_written_above_its_box():
    image = Image.new("RGB", (200, 100), "white")

    drawn = draw_boxes(image, "<ref>cat</ref><box>(250,500),(750,800)</box>")

    _, top, _, _ = ImageChops.difference(image, drawn).getbbox()
    assert top < 50


def test_a_label_stays_inside_the_picture():
    image = Image.new("RGB", (200, 100), "white")

    drawn = draw_boxes(image, "<ref>corner</ref><box>(950,0),(999,30)</box>")

    left, top, _, _ = ImageChops.difference(image, drawn).getbbox()
    assert top == 0
    assert left < 185


def test_what_cannot_be_drawn_is_logged(caplog):
    image = Image.new("L", (20, 10))

    with caplog.at_level(logging.WARNING):
        drawn = draw_boxes(image, "<box>(1,2)</box>")

    assert drawn.mode == "RGB"
    assert caplog.messages == ["not drawn: <box>(1,2)</box> is not a box"]


PIECES = st.sampled_from(
    [
        "<ref>",
        "</ref>",
        "<box>",
        "</box>",
        "<quad>",
        "(1,2)",
        ",",
        "(30,40)",
        "cat",
        " ",
        "猫",
        "-9",
    ]
)


@given(st.lists(PIECES, max_size=12).map("".join))
def test_any_text_is_drawn_or_explained(text):
    draw_boxes(Image.new("RGB", (64, 48)), text)


@pytest.fixture
def fonts(monkeypatch):
    """Sets which font files this machine seems to have; forgets what was looked up before."""

    def install(*files):
        monkeypatch.setattr(matplotlib.font_manager, "findSystemFonts", lambda: list(files))
        wide_font_file.cache_clear()
        label_font.cache_clear()

    yield install
    wide_font_file.cache_clear()
    label_font.cache_clear()


def test_a_font_with_cjk_characters_is_found_by_its_name(fonts):
    fonts("/fonts/Arial.ttf", "/fonts/NotoSansCJK-Regular.ttc", "/fonts/wqy-zenhei.ttc")

    assert wide_font_file() == Path("/fonts/NotoSansCJK-Regular.ttc")


def test_the_log_says_when_no_font_has_cjk_characters(fonts, caplog):
    fonts("/fonts/Arial.ttf")

    with caplog.at_level(logging.WARNING):
        draw_boxes(Image.new("RGB", (200, 100)), "<ref>猫</ref><box>(250,500),(750,800)</box>")

    assert caplog.messages == [
        "no font with CJK characters on this machine: such labels are unreadable"
    ]
