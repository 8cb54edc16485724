"""Records of ms-swift: questions with a history, names and boxes beside the text."""

import json

import pytest

from vltrain.data.conversation import ImagePart, TextPart, Turn
from vltrain.data.faults import Fault
from vltrain.data.formats import conversation_from_record, read_conversation
from vltrain.errors import VltrainError


def asked(query, response="a", **keys):
    return {"query": query, "response": response, **keys}


def located(bbox, **keys):
    """A record that asks for one box on its one picture."""
    return asked("<image>q", "<bbox>", images=["a.png"], objects={"bbox": [bbox], **keys})


def kinds(value, **options):
    return [fault.kind for fault in read_conversation(value, **options)[1]]


def answer(value, size=(200, 50)):
    conversation = conversation_from_record(value, image_size=lambda source: size)
    return conversation.turns[-1].text


def test_history_comes_before_the_question_and_the_system_before_all():
    value = asked("q", "a", history=[["p", "b"]], system="S")

    assert conversation_from_record(value).turns == (
        Turn("system", (TextPart("S"),)),
        Turn("user", (TextPart("p"),)),
        Turn("assistant", (TextPart("b"),)),
        Turn("user", (TextPart("q"),)),
        Turn("assistant", (TextPart("a"),)),
    )


def test_pictures_go_to_their_places_in_history_and_question():
    value = asked("<image>q", history=[["<image>p", "b"]], images=["1.png", "2.png"])

    conversation = conversation_from_record(value)

    assert conversation.turns[0].parts == (ImagePart("1.png"), TextPart("p"))
    assert conversation.turns[2].parts == (ImagePart("2.png"), TextPart("q"))


def test_a_question_without_pictures_beside_it_may_name_them_in_tags():
    value = asked("Picture 1:<img>a.png</img>\nq", "<ref>x</ref>", history=[["p", "b"]], system="S")

    conversation = conversation_from_record(value)

    assert conversation.turns[0].role == "system"
    assert conversation.turns[3].parts == (
        TextPart("Picture 1:"),
        ImagePart("a.png"),
        TextPart("\nq"),
    )


def test_a_question_names_its_pictures_in_one_way_alone():
    assert kinds(asked("<img>a.png</img><image>", images=["a.png"])) == ["picture_markup"]


def test_boxes_in_pixels_are_scaled_by_the_pictures_size():
    assert answer(located([50, 10, 200, 40])) == "<box>(250,200),(999,800)</box>"


def test_a_box_is_measured_on_the_picture_that_it_names():
    sizes = {"a.png": (100, 100), "b.png": (1000, 500)}
    value = asked("<image><image>q", "<bbox>", images=["a.png", "b.png"])
    value["objects"] = {"bbox": [[10, 10, 20, 20]], "image_id": [1]}

    conversation = conversation_from_record(value, image_size=sizes.get)

    assert conversation.turns[-1].text == "<box>(10,20),(20,40)</box>"


@pytest.mark.parametrize(
    ("unit", "bbox", "written"),
    [
        ("norm1", [0, 0.25, 0.5, 1.0], "<box>(0,250),(500,999)</box>"),
        ("norm1000", [0, 250, 500, 999], "<box>(0,250),(500,999)</box>"),
        ("norm_1000", [0.4, 250, 500, 999], "<box>(0,250),(500,999)</box>"),
    ],
)
def test_boxes_as_shares_need_no_picture(unit, bbox, written):
    conversation = conversation_from_record(located(bbox, bbox_type=unit))

    assert conversation.turns[-1].text == written


def test_the_older_list_of_objects_is_read_as_a_list_and_as_a_string():
    objects = [{"caption": "cat", "bbox": [0, 0, 500, 500], "bbox_type": "norm1000", "image": 0}]
    value = asked("<image>q", "<ref-object><bbox>", images=["a.png"], objects=objects)
    expected = "<ref>cat</ref><box>(0,0),(500,500)</box>"

    assert conversation_from_record(value).turns[-1].text == expected
    value["objects"] = json.dumps(objects)
    assert conversation_from_record(value).turns[-1].text == expected


def test_boxes_in_pixels_of_an_unknown_picture_are_refused():
    with pytest.raises(VltrainError, match=r"box 0 of `objects` is in pixels of 'a\.png'"):
        conversation_from_record(located([1, 2, 3, 4]))
    broken = Fault("broken_picture", "broken", "replace it")
    assert kinds(located([1, 2, 3, 4]), image_size=lambda source: broken) == ["pixel_box"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"query": "q"}, "bad_turn"),
        ({"response": "a"}, "bad_turn"),
        ({"query": "q", "respones": "a"}, "bad_turn"),
        (asked(3), "bad_turn"),
        (asked("q", history="p"), "bad_turn"),
        (asked("q", history=["p", "b"]), "bad_turn"),
        (asked("q", history=[["p"]]), "bad_turn"),
        (asked("q", system=3), "bad_turn"),
        (asked("<image>q"), "missing_pictures"),
        (asked("q", images=[3]), "bad_pictures"),
        (asked("q", objects=3), "bad_objects"),
        (asked("q", objects="{"), "bad_objects"),
        (asked("q", objects={"ref": "cat"}), "bad_objects"),
        (asked("q", objects={"ref": [3]}), "bad_objects"),
        (asked("q", "<bbox>", objects={}), "missing_objects"),
        (asked("q", "<ref-object>", objects={"bbox": []}), "missing_objects"),
        (asked("q", "<bbox>", objects={"bbox": [[1, 2, 3, 4]]}), "bad_objects"),
        (located([1, 2]), "malformed_box"),
        (located("1,2,3,4"), "malformed_box"),
        (located([1, 2, 3, "4"]), "malformed_box"),
        (located([1, 2, 3, float("nan")]), "malformed_box"),
        (located([1, 2, 3, 4], bbox_type="feet"), "bad_objects"),
        (located([1, 2, 3, 4], bbox_type=["real"]), "bad_objects"),
        (located([1, 2, 3, 4], image_id=[1]), "bad_objects"),
        (located([1, 2, 3, 4], image_id=[]), "pixel_box"),
        (located([1, 2, 3, 4], image_id=[0, 0]), "bad_objects"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(value, kind):
    assert kind in kinds(value)
    with pytest.raises(VltrainError):
        conversation_from_record(value)


def test_a_misspelt_key_is_named_with_the_one_that_was_meant():
    with pytest.raises(VltrainError, match=r"`response` is not there \(`respones` is near it\)"):
        conversation_from_record({"query": "q", "respones": "a"})


def test_objects_that_the_text_has_no_place_for_are_a_warning():
    value = asked("q", objects={"ref": ["cat"], "bbox": []})

    assert kinds(value) == ["unplaced_objects"]
    assert conversation_from_record(value).turns
