import pytest

from vltrain.data.grounding import Box
from vltrain.evaluation.metrics import box_iou, box_overlaps, is_exact


def test_blanks_around_an_answer_do_not_make_it_wrong():
    assert is_exact(" 3 1 4\n", "3 1 4")


def test_a_blank_inside_an_answer_counts():
    assert not is_exact("314", "3 1 4")


def test_half_shifted_boxes_share_a_third_of_what_they_cover():
    # 10 x 10 each, 5 x 10 shared: 50 / (100 + 100 - 50)
    assert box_iou(Box(0, 0, 10, 10), Box(5, 0, 15, 10)) == pytest.approx(1 / 3)


def test_boxes_that_only_touch_share_nothing():
    assert box_iou(Box(0, 0, 10, 10), Box(10, 0, 20, 10)) == 0


def test_boxes_without_area_have_an_iou_of_zero():
    assert box_iou(Box(5, 5, 5, 5), Box(5, 5, 5, 5)) == 0


def test_each_expected_box_is_held_against_the_answered_box_that_fits_it_best():
    expected = "<box>(0,0),(10,10)</box> and <box>(100,100),(110,110)</box>"
    answer = "<box>(100,100),(110,110)</box><box>(0,0),(5,10)</box>"

    assert box_overlaps(answer, expected) == [0.5, 1.0]


@pytest.mark.parametrize("answer", ["", "<box>(0,0),(10", "<box>(a,b),(c,d)</box>", "7"])
def test_an_answer_without_a_readable_box_overlaps_nothing(answer):
    assert box_overlaps(answer, "<box>(0,0),(10,10)</box>") == [0.0]


def test_an_expected_answer_without_boxes_has_no_overlaps():
    assert box_overlaps("<box>(0,0),(10,10)</box>", "7") == []
