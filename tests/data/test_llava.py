"""LLaVA's list, made into the Qwen-VL form."""

import pytest
from annotations import Named, counts, said
from hypothesis import given, settings
from hypothesis import strategies as st

from vltrain.data.llava import convert_llava

ENTRY = {
    "id": "7",
    "image": "a.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
    ],
}


def convert(*entries):
    return convert_llava(entries, pictures=Named())


def asked(*values):
    """Turns that ask and answer alternately."""
    roles = ("human", "gpt")
    return [{"from": roles[n % 2], "value": value} for n, value in enumerate(values)]


def test_a_placeholder_becomes_its_picture():
    assert convert(ENTRY).records == [
        {
            "id": "7",
            "conversations": [
                {"from": "user", "value": "Picture 1: <img>a.jpg</img>\nWhat is it?"},
                {"from": "assistant", "value": "A cat."},
            ],
        }
    ]


def test_placeholders_are_numbered_through_all_turns_and_stay_in_their_place():
    turns = asked("<image>\n<image>\nWhich?", "Both.", "And this?\n<image>", "No.")

    conversion = convert({"images": ["a.jpg", "b.jpg", "c.jpg"], "conversations": turns})

    assert said(conversion.records[0])[::2] == [
        "Picture 1: <img>a.jpg</img>\nPicture 2: <img>b.jpg</img>\nWhich?",
        "And this?\nPicture 3: <img>c.jpg</img>",
    ]


def test_an_entry_without_pictures_is_kept():
    conversion = convert({"conversations": asked("Hi.", "Hello.")})

    assert said(conversion.records[0]) == ["Hi.", "Hello."]
    assert conversion.records[0]["id"] == "0"


def test_a_system_turn_is_kept():
    turns = [{"from": "system", "value": "Be short."}, *asked("Hi.", "Hello.")]

    assert said(convert({"conversations": turns}).records[0]) == ["Be short.", "Hi.", "Hello."]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conversations": None}, "entries without `conversations` of `from` and `value`"),
        ({"conversations": ["hi"]}, "entries without `conversations` of `from` and `value`"),
        (
            {"conversations": [{"from": "human"}]},
            "entries without `conversations` of `from` and `value`",
        ),
        (
            {"conversations": [{"from": "tool", "value": "<image>"}]},
            "entries with a role other than human, gpt, user, assistant, system",
        ),
        ({"image": 3}, "entries whose `image` is no file name"),
        ({"image": ""}, "entries whose `image` is no file name"),
        ({"image": None}, "entries with more <image> than pictures"),
        ({"image": ["a.jpg", "b.jpg"]}, "entries with fewer <image> than pictures"),
        ({"image": "a</img>"}, "entries with pictures whose names a record cannot hold"),
        (
            {"conversations": asked("<image> <img>b.jpg</img>", "Yes.")},
            "entries whose text holds <img> tags",
        ),
        ({"video": "a.mp4"}, "entries about a video"),
    ],
)
def test_an_entry_of_another_form_is_left_out_with_the_reason(change, reason):
    conversion = convert(ENTRY, {**ENTRY, **change})

    assert len(conversion.records) == 1
    assert counts(conversion.left_out) == {reason: 1}
    assert conversion.left_out[reason].first == "entry 1"


def test_an_entry_that_is_no_object_is_left_out():
    assert counts(convert("entry").left_out) == {
        "entries without `conversations` of `from` and `value`": 1
    }


JSON = st.recursive(
    st.none() | st.integers() | st.sampled_from(["human", "gpt", "<image>", "<img>", "a.jpg"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["from", "value", "image", "conversations"]), inner)
    ),
    max_leaves=10,
)


@settings(max_examples=100)
@given(JSON)
def test_any_json_is_converted_or_left_out(entry):
    conversion = convert(entry)

    assert len(conversion.records) + sum(counts(conversion.left_out).values()) == 1
