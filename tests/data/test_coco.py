"""COCO's object annotations, made into conversations."""

import copy

import pytest
from annotations import ANY_JSON, Named, counts, said
from hypothesis import given, settings
from hypothesis import strategies as st

from vltrain.data.coco import convert_coco
from vltrain.errors import VltrainError

CAT, DOG = 17, 18
STREET = {
    "images": [
        {"id": 1, "file_name": "street.jpg", "width": 400, "height": 200},
        {"id": 2, "file_name": "empty.jpg", "width": 400, "height": 200},
    ],
    "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
    "annotations": [
        {"id": 7, "image_id": 1, "category_id": DOG, "bbox": [0, 0, 40, 20], "iscrowd": 0},
        {"id": 8, "image_id": 1, "category_id": CAT, "bbox": [200, 100, 100, 50]},
        {"id": 9, "image_id": 1, "category_id": CAT, "bbox": [100.0, 50.0, 100.0, 50.0]},
    ],
}


def street(**changes):
    """The file with one entry of it changed: `annotations={"bbox": []}` of the first."""
    value = copy.deepcopy(STREET)
    for table, entry in changes.items():
        value[table][0] |= entry
    return value


def convert(value, **sizes):
    return convert_coco(value, where="instances.json", pictures=Named(**sizes))


def test_each_category_of_a_picture_is_asked_for_once_and_all_its_boxes_are_named():
    conversion = convert(STREET)

    assert conversion.records == [
        {
            "id": "1",
            "conversations": [
                {
                    "from": "user",
                    "value": "Picture 1: <img>street.jpg</img>\nDetect every cat.",
                },
                {
                    "from": "assistant",
                    "value": "<ref>cat</ref><box>(250,250),(500,500)</box>"
                    "<box>(500,500),(750,750)</box>",
                },
                {"from": "user", "value": "Detect every dog."},
                {"from": "assistant", "value": "<ref>dog</ref><box>(0,0),(100,100)</box>"},
            ],
        }
    ]
    assert conversion.places == ["images[0]"]


def test_a_picture_without_a_box_is_left_out_and_counted():
    assert counts(convert(STREET).left_out) == {"pictures without a box": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"iscrowd": 1}, "crowd regions"),
        ({"bbox": [5, 5, 0, 9]}, "boxes without area"),
        ({"bbox": [5, 5, 9, -1]}, "boxes without area"),
        ({"bbox": [400, 5, 9, 9]}, "boxes outside their picture"),
    ],
)
def test_what_shows_no_single_thing_is_left_out_and_counted(change, reason):
    conversion = convert(street(annotations=change))

    assert counts(conversion.left_out)[reason] == 1
    assert conversion.left_out[reason].first == "annotations[0]"
    assert len(said(conversion.records[0])) == 2


def test_a_box_that_leaves_its_picture_is_cut_off_and_counted():
    conversion = convert(street(annotations={"bbox": [-4, 0, 44, 20.5]}))

    assert counts(conversion.changed) == {"boxes cut off at the edge of their picture": 1}
    assert said(conversion.records[0])[3] == "<ref>dog</ref><box>(0,0),(100,102)</box>"


def test_what_rounding_would_lose_is_not_called_cut_off():
    conversion = convert(street(annotations={"bbox": [-0.1, 100, 40.1, 100.05]}))

    assert conversion.changed == {}


def test_boxes_just_over_the_edge_are_not_taken_for_misread():
    value = street()
    value["annotations"] = [
        {"image_id": 1, "category_id": CAT, "bbox": [1, 1, 400, 200]} for _ in range(8)
    ]

    conversion = convert(value)

    assert counts(conversion.changed) == {"boxes cut off at the edge of their picture": 8}


def test_the_question_is_the_users():
    conversion = convert_coco(
        STREET, where="f", pictures=Named(), question="{category}: where is {category}?"
    )

    assert said(conversion.records[0])[2] == "dog: where is dog?"


def test_a_question_that_names_no_category_is_refused():
    with pytest.raises(VltrainError, match=r"--question: 'Where' does not hold {category}"):
        convert_coco(STREET, where="f", pictures=Named(), question="Where")


def test_a_size_that_the_file_lacks_is_the_pictures_own():
    value = street()
    del value["images"][0]["width"], value["images"][0]["height"]
    pictures = Named(**{"street.jpg": (800, 200)})

    conversion = convert_coco(value, where="f", pictures=pictures)

    assert said(conversion.records[0])[3] == "<ref>dog</ref><box>(0,0),(50,100)</box>"


def test_a_size_that_nobody_knows_is_an_error():
    value = street(images={"width": None, "height": None})

    with pytest.raises(VltrainError) as error:
        convert(value)

    assert str(error.value) == (
        "instances.json: 1 fault\n"
        "  images[0]: no `width` and `height`, no file 'street.jpg'\n"
        "  fix: write `width` and `height`, or name the pictures' folder: --images"
    )


@pytest.mark.parametrize(
    ("table", "change", "fault"),
    [
        ("images", {"id": None}, r"images\[0\]: has no `id`"),
        ("images", {"id": 2}, r"images\[1\]: its id 2 is taken already"),
        ("images", {"file_name": None}, r"images\[0\]: has no `file_name`"),
        ("images", {"width": 0}, r"images\[0\]: `width` and `height` are 0 and 200, not a size"),
        ("images", {"height": None}, r"images\[0\]: `width` and `height` are 400 and None"),
        ("images", {"height": "200"}, r"images\[0\]: `width` and `height` are 400 and '200'"),
        ("categories", {"id": True}, r"categories\[0\]: has no `id`"),
        ("categories", {"name": 3}, r"categories\[0\]: has no `name`"),
        ("categories", {"name": "dog"}, r"categories\[1\]: its name 'dog' is taken already"),
        ("categories", {"name": "<box>"}, r"categories\[0\]: the ref '<box>' holds <box>"),
        ("annotations", {"image_id": 3}, r"annotations\[0\]: `image_id` 3 is not in `images`"),
        ("annotations", {"image_id": [1]}, r"annotations\[0\]: has no `image_id`"),
        ("annotations", {"category_id": 9}, r"`category_id` 9 is not in `categories`"),
        ("annotations", {"bbox": [1, 2, 3]}, r"`bbox` is \[1, 2, 3\], not four numbers"),
        ("annotations", {"bbox": [1, 2, 3, None]}, r"not four numbers"),
        ("annotations", {"bbox": [1, 2, 3, float("nan")]}, r"not four numbers"),
        ("annotations", {"bbox": [1, 2, 3, 10**400]}, r"not four numbers"),
        ("annotations", {"bbox": None}, r"`bbox` is None, not four numbers"),
    ],
)
def test_an_entry_of_another_form_is_named(table, change, fault):
    with pytest.raises(VltrainError, match=fault):
        convert(street(**{table: change}))


@pytest.mark.parametrize("value", [[], None, "text", {}, {"images": [], "annotations": []}])
def test_a_file_of_another_form_is_refused(value):
    with pytest.raises(VltrainError, match="give COCO's object annotations"):
        convert(value)


def test_all_faults_are_in_one_message_which_stays_short():
    value = street(images={"file_name": None})
    value["annotations"] = [{"image_id": 2, "category_id": CAT}] * 30

    with pytest.raises(VltrainError) as error:
        convert(value)

    message = str(error.value)
    assert message.startswith("instances.json: 31 faults\n  images[0]: has no `file_name`\n")
    assert "\n  and 11 more\n" in message


def test_a_name_that_a_record_cannot_hold_is_left_out():
    conversion = convert(street(images={"file_name": "a</img>.jpg"}))

    assert conversion.records == []
    assert counts(conversion.left_out)["pictures whose names a record cannot hold"] == 1


def test_corners_taken_for_sizes_are_noticed():
    value = street()
    value["annotations"] = [
        {"image_id": 1, "category_id": CAT, "bbox": [300, 150, 390, 190]} for _ in range(8)
    ]

    with pytest.raises(VltrainError, match="8 of 8 boxes are empty or leave their picture"):
        convert(value)


ENTRY = st.dictionaries(
    st.sampled_from(["id", "file_name", "width", "height", "name", "image_id", "bbox", "iscrowd"]),
    ANY_JSON,
)
TABLE = st.lists(ENTRY | ANY_JSON, max_size=3) | ANY_JSON


@settings(max_examples=100)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(STREET, TABLE)))
def test_any_json_is_converted_or_refused(value):
    try:
        conversion = convert({**STREET, **value})
    except VltrainError:
        return
    assert len(conversion.records) == len(conversion.places)
