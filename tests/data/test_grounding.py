"""Boxes in text, read, written and drawn; boxes in pixels, to the grid and back."""

import logging
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from vltrain.data.faults import Fault
from vltrain.data.grounding import (
    Box,
    PixelBox,
    Quad,
    clip_to_picture,
    draw_boxes,
    grid_box,
    parse_boxes,
    parse_regions,
    read_regions,
    write_regions,
)
from vltrain.errors import VltrainError


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
    assert [(fault.kind, fault.grade) for fault in read_regions(text)[1]] == [(kind, grade)]


def test_a_box_in_pixels_follows_the_pictures_size():
    assert Box(0, 250, 500, 1000).in_pixels(width=400, height=200) == (0, 50, 200, 200)


def test_quads_are_read_in_order_with_boxes_and_refs():
    text = "<ref>sign</ref><quad>(1,2),(3,4),(5,6),(7,8)</quad><box>(1,2),(3,4)</box>"

    assert parse_regions(text) == (
        [Quad(((1, 2), (3, 4), (5, 6), (7, 8)), "sign"), Box(1, 2, 3, 4, "sign")],
        [],
    )


def test_boxes_of_one_ref_are_written_behind_it_once():
    regions = [
        Box(1, 2, 3, 4, "cat"),
        Box(5, 6, 7, 8, "cat"),
        Quad(((1, 2), (3, 4), (5, 6), (7, 8)), "dog"),
        Box(0, 0, 999, 999),
    ]

    assert write_regions(regions) == (
        "<ref>cat</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>, "
        "<ref>dog</ref><quad>(1,2),(3,4),(5,6),(7,8)</quad>, "
        "<box>(0,0),(999,999)</box>"
    )


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        (Box(1, 2, 3, 1001), r"leaves the range"),
        (Box(-1, 2, 3, 4), r"leaves the range"),
        (Box(5, 2, 3, 4), r"is inverted"),
        (Quad(((1, 2), (3, 4))), r"is not a quad"),
        (Box(1, 2, 3, 4, ""), r"is empty or has blanks"),
        (Box(1, 2, 3, 4, " cat"), r"is empty or has blanks"),
        (Box(1, 2, 3, 4, "a</ref>b"), r"holds </ref>"),
        (Box(1, 2, 3, 4, "<img>cat"), r"holds <img>"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(region, reason):
    with pytest.raises(VltrainError, match=reason):
        write_regions([region])


PLACES = st.integers(0, 999)
REFS = st.none() | st.sampled_from(["cat", "the cat", "猫", "(1,2)", "a < b", "<|im_end|>"])
BOXES = st.builds(
    lambda xs, ys, ref: Box(min(xs), min(ys), max(xs), max(ys), ref),
    st.tuples(PLACES, PLACES),
    st.tuples(PLACES, PLACES),
    REFS,
)
QUADS = st.builds(Quad, st.tuples(*[st.tuples(PLACES, PLACES)] * 4), REFS)


@settings(max_examples=50)
@given(st.lists(BOXES | QUADS, max_size=5))
def test_what_is_written_is_read_back(regions):
    assert parse_regions(write_regions(regions)) == (regions, [])


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (PixelBox.from_xywh(100, 50, 200, 100), Box(250, 250, 750, 750)),
        (PixelBox.from_shares((0.25, 0.25, 0.75, 0.75), 400, 200), Box(250, 250, 750, 750)),
        (PixelBox(0, 0, 400, 200), Box(0, 0, 999, 999)),  # the last line of the grid is 999
        (PixelBox(-20, 150, 900, 201), Box(0, 750, 999, 999)),  # what leaves the picture is cut off
        (PixelBox(100.19, 0, 100.21, 0.3), Box(250, 0, 251, 2)),  # to the nearest line
        (PixelBox(100.01, 20, 100.02, 40), Box(250, 100, 250, 200)),  # narrower than a cell
    ],
)
def test_pixels_go_to_the_nearest_line_of_the_grid(pixels, expected):
    assert grid_box(pixels, width=400, height=200) == expected


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        (PixelBox(5, 5, 5, 9), "empty_box"),
        (PixelBox(9, 5, 5, 9), "empty_box"),
        (PixelBox(400, 5, 410, 9), "box_outside_picture"),
        (PixelBox(-10, 5, 0, 9), "box_outside_picture"),
        (PixelBox(5, 200, 10, 300), "box_outside_picture"),
        (PixelBox(5, -9, 10, 0), "box_outside_picture"),
        (PixelBox(math.nan, 5, 10, 9), "bad_number"),
        (PixelBox(0, 5, math.inf, 9), "bad_number"),
    ],
)
def test_a_box_of_which_nothing_is_on_the_picture_is_refused(pixels, kind):
    fault = clip_to_picture(pixels, 400, 200)

    assert isinstance(fault, Fault)
    assert fault.kind == kind
    with pytest.raises(VltrainError, match=r"box of 'cat': " + re.escape(fault.message)):
        grid_box(pixels, 400, 200, "cat")


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-1, 10)])
def test_a_picture_without_a_size_has_no_grid(size):
    with pytest.raises(VltrainError, match="the picture is"):
        grid_box(PixelBox(0, 0, 1, 1), *size)


@settings(max_examples=100)
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_pixels_come_back_within_half_a_cell(width, height, shares):
    left, right = sorted(shares[:2])
    top, bottom = sorted(shares[2:])
    pixels = PixelBox.from_shares((left, top, right, bottom), width, height)
    if isinstance(clip_to_picture(pixels, width, height), Fault):
        return

    back = grid_box(pixels, width, height).in_pixels(width, height)

    sides = (width, height, width, height)
    before = (pixels.left, pixels.top, pixels.right, pixels.bottom)
    for side, there, here in zip(sides, before, back, strict=True):
        cell = side / 1000
        allowed = cell if there > 999.5 * cell else cell / 2  # the far edge has no line
        assert abs(there - here) <= allowed + 1e-9 * side


@settings(max_examples=50)
@given(BOXES, st.integers(1, 5000), st.integers(1, 5000))
def test_a_box_on_the_grid_comes_back_from_pixels_as_it_was(box, width, height):
    if box.x1 == box.x2 or box.y1 == box.y2:
        return

    assert grid_box(PixelBox(*box.in_pixels(width, height)), width, height, box.ref) == box


def test_boxes_are_drawn_where_they_are_and_the_picture_is_left_alone():
    image = Image.new("RGB", (200, 100), "white")

    drawn = draw_boxes(image, "<box>(250,200),(750,800)</box>")

    assert ImageChops.difference(image, drawn).getbbox() == (50, 20, 151, 81)
    assert image.getcolors() == [(20000, (255, 255, 255))]
    assert drawn.getpixel((100, 50)) == (255, 255, 255)


def test_quads_are_drawn_from_corner_to_corner():
    image = Image.new("RGB", (200, 100), "white")

    drawn = draw_boxes(image, "<quad>(250,200),(750,200),(750,800),(250,800)</quad>")

    assert drawn.getpixel((50, 50)) != (255, 255, 255)
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


@settings(max_examples=100)
@given(st.lists(PIECES | st.text(max_size=4), max_size=12).map("".join))
def test_every_box_tag_gives_a_region_or_a_reason(text):
    regions, reasons = parse_regions(text)

    assert len(regions) + len(reasons) >= len(re.findall("<(?:box|quad)>", text))
