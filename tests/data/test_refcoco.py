"""Referring expressions, made into conversations."""

import pytest
from annotations import ANY_JSON, Named, counts, said
from hypothesis import given, settings
from hypothesis import strategies as st

from vltrain.data.coco import read_coco
from vltrain.data.refcoco import convert_refcoco
from vltrain.errors import VltrainError

SIZE = {"width": 400, "height": 200}
ENTRY = {"image": "a.jpg", "expression": "the cat", "bbox": [100, 50, 200, 100], **SIZE}
ANSWER = "<ref>the cat</ref><box>(250,250),(750,750)</box>"
INSTANCES = {
    "images": [{"id": 5, "file_name": "COCO_train2014_5.jpg", **SIZE}],
    "categories": [{"id": 17, "name": "cat"}],
    "annotations": [{"id": 9, "image_id": 5, "category_id": 17, "bbox": [100, 50, 200, 100]}],
}


def convert(*entries, sizes=None, **options):
    pictures = Named(**(sizes or {}))
    return convert_refcoco(entries, where="refs.json", pictures=pictures, **options)


def test_an_expression_becomes_a_question_and_its_box_the_answer():
    conversion = convert(ENTRY)

    assert conversion.records == [
        {
            "id": "0-0",
            "conversations": [
                {
                    "from": "user",
                    "value": "Picture 1: <img>a.jpg</img>\nWhere is the cat?",
                },
                {"from": "assistant", "value": ANSWER},
            ],
        }
    ]
    assert conversion.places == ["entry 0"]


@pytest.mark.parametrize(
    ("entry", "answers"),
    [
        ({"img_path": "a.jpg", "sentences": ["the cat"], "box": [100, 50, 200, 100]}, [ANSWER]),
        ({"file_name": "a.jpg", "sents": [" the cat "], "bbox": [[100, 50, 200, 100]]}, [ANSWER]),
        (
            {
                "file_name": "a.jpg",
                "sentences": [{"sent": "the cat", "raw": "The cat!"}, {"raw": "it"}],
                "bbox": [100, 50, 200, 100],
            },
            [ANSWER, "<ref>it</ref><box>(250,250),(750,750)</box>"],
        ),
        (
            {
                "image": "a.jpg",
                "expressions": ["the cat"],
                "bboxes": [[0, 0, 40, 20], [100, 50, 200, 100]],
            },
            ["<ref>the cat</ref><box>(0,0),(100,100)</box><box>(250,250),(750,750)</box>"],
        ),
    ],
)
def test_entries_are_read_in_their_several_forms(entry, answers):
    conversion = convert({**entry, **SIZE})

    assert [said(record)[1] for record in conversion.records] == answers


@pytest.mark.parametrize(
    ("form", "box"),
    [
        ("xywh", [100, 50, 200, 100]),
        ("xyxy", [100, 50, 300, 150]),
        ("normalised", [0.25, 0.25, 0.75, 0.75]),
    ],
)
def test_boxes_are_read_in_the_form_that_is_said(form, box):
    conversion = convert({**ENTRY, "bbox": box}, boxes=form)

    assert said(conversion.records[0])[1] == ANSWER


def test_boxes_between_0_and_1_are_not_taken_for_pixels():
    with pytest.raises(VltrainError, match=r"all boxes lie within 0 and 1.*\n.*--boxes normalised"):
        convert({**ENTRY, "bbox": [0.25, 0.25, 0.75, 0.75]})


def test_two_corners_are_not_taken_for_a_corner_and_a_size():
    with pytest.raises(VltrainError, match=r"8 of 8 boxes .*\n.*--boxes, now xywh"):
        convert(*[{**ENTRY, "bbox": [250, 50, 350, 180]}] * 8)


def test_an_expression_that_means_more_than_is_on_the_picture_is_left_out():
    boxes = [[100, 50, 200, 100], [500, 50, 20, 20]]

    conversion = convert(ENTRY, {**ENTRY, "expressions": ["a", "b"], "bbox": boxes})

    assert len(conversion.records) == 1
    assert counts(conversion.left_out) == {
        "boxes outside their picture": 1,
        "expressions without all their boxes": 2,
    }


@pytest.mark.parametrize("expression", ["", "  ", "a <box> b", "<img>b.jpg</img>"])
def test_an_expression_that_is_no_plain_words_is_left_out(expression):
    conversion = convert(ENTRY, {**ENTRY, "expression": expression})

    assert len(conversion.records) == 1
    assert counts(conversion.left_out) == {"expressions that are empty or hold tags": 1}
    assert conversion.left_out["expressions that are empty or hold tags"].first == "entry 1"


def test_a_name_that_a_record_cannot_hold_is_left_out():
    conversion = convert({**ENTRY, "image": " a.jpg"})

    assert counts(conversion.left_out) == {"pictures whose names a record cannot hold": 1}


def test_a_size_that_the_entry_lacks_is_the_pictures_own():
    entry = {"image": "a.jpg", "expression": "the cat", "bbox": [100, 50, 200, 100]}

    conversion = convert(entry, sizes={"a.jpg": (400, 200)})

    assert said(conversion.records[0])[1] == ANSWER


def test_several_splits_are_not_mixed_without_a_word():
    entries = [{**ENTRY, "split": split} for split in ("train", "train", "testA")]

    with pytest.raises(VltrainError, match=r"several splits: testA \(1\), train \(2\)"):
        convert(*entries)
    with pytest.raises(VltrainError, match=r"no split val; it holds testA \(1\), train \(2\)"):
        convert(*entries, splits=["val"])

    conversion = convert(*entries, splits=["train"])
    assert len(conversion.records) == 2
    assert counts(conversion.left_out) == {"entries of other splits": 1}


def test_boxes_and_pictures_come_from_the_instances_by_the_annotations_id():
    ref = {
        "ann_id": 9,
        "file_name": "COCO_train2014_5_9.jpg",
        "sentences": [{"sent": "the cat"}],
        "split": "train",
    }

    conversion = convert(ref, instances=read_coco(INSTANCES, "instances.json"))

    assert said(conversion.records[0]) == [
        "Picture 1: <img>COCO_train2014_5.jpg</img>\nWhere is the cat?",
        ANSWER,
    ]


@pytest.mark.parametrize("identity", [8, "9", None, [9]])
def test_an_annotation_that_the_instances_lack_is_named(identity):
    ref = {"ann_id": identity, "sentences": ["the cat"]}

    with pytest.raises(
        VltrainError, match=r"entry 0 has the `ann_id` .* not in the instances file"
    ):
        convert(ref, instances=read_coco(INSTANCES, "instances.json"))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"expression": None}, "entry 0 has no expression"),
        ({"expression": 3}, "entry 0 has no expression"),
        ({"expression": [{"tokens": []}]}, "entry 0 has no expression"),
        ({"bbox": None}, "entry 0 has no box"),
        ({"bbox": [1, 2, 3]}, "entry 0 has no box"),
        ({"bbox": [[1, 2, 3, 4], [1, 2]]}, "entry 0 has no box"),
        ({"bbox": []}, "entry 0 has no box"),
        ({"bbox": [1, 2, 3, float("inf")]}, "entry 0 has no box"),
        ({"image": None}, "entry 0 has no picture"),
        ({"image": 3}, "entry 0 has no picture"),
        ({"width": 0}, "entry 0 is of no size: `width` and `height` are 0 and 200"),
        ({"width": None, "height": None}, "entry 0 has no `width` and `height`, and no file"),
    ],
)
def test_an_entry_of_another_form_is_named(change, fault):
    with pytest.raises(VltrainError, match=fault):
        convert({**ENTRY, **change})


def test_an_entry_that_is_no_object_is_named():
    with pytest.raises(VltrainError, match="entry 1 is not an object"):
        convert(ENTRY, "refs")


KEYS = ("image", "expressions", "bbox", "width", "height", "ann_id", "split")


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(KEYS), ANY_JSON))
def test_any_json_is_converted_or_refused(change):
    try:
        conversion = convert({**ENTRY, **change})
    except VltrainError:
        return
    assert len(conversion.records) == len(conversion.places)
