"""Lists of turns whose pictures are parts, or placeholders for those beside the list."""

import pytest
from letters import record

from vltrain.data.conversation import ImagePart, TextPart
from vltrain.data.formats import conversation_from_record, read_conversation
from vltrain.errors import VltrainError


def kinds(value):
    return [fault.kind for fault in read_conversation(value)[1]]


def said(*contents, key="messages", **keys):
    """A record of `role`/`content` turns, from user and assistant by turns."""
    turns = [
        {"role": "assistant" if place % 2 else "user", "content": content}
        for place, content in enumerate(contents)
    ]
    return {key: turns, **keys}


def first_parts(value, **options):
    return conversation_from_record(value, **options).turns[0].parts


def text(words):
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": " a.png "},
        {"type": "image", "image": {"path": "a.png", "bytes": None}},
        {"type": "image", "image": "a.png", "text": None},
        {"image": "a.png"},
    ],
)
def test_a_picture_part_is_read_in_every_form(part):
    value = said([text("a"), text("b"), part, text("c")], "a")

    assert first_parts(value) == (TextPart("ab"), ImagePart("a.png"), TextPart("c"))


def test_a_picture_part_without_a_source_takes_the_next_picture_beside_the_turns():
    value = said([{"type": "image"}, text("q"), {"type": "image"}], "a", images=["1", "2"])

    assert first_parts(value) == (ImagePart("1"), TextPart("q"), ImagePart("2"))


@pytest.mark.parametrize(
    "keys",
    [
        {"image": "a.png"},
        {"images": ["a.png"]},
        {"images": "a.png"},
        {"images": [{"path": "a.png", "bytes": None}]},
        {"images": [], "image": "a.png"},
    ],
)
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_a_placeholder_takes_the_picture_beside_the_turns(key, keys):
    value = said("Look: <image>\nq", "a", key=key, **keys)

    assert first_parts(value) == (TextPart("Look: "), ImagePart("a.png"), TextPart("\nq"))


def test_pictures_without_a_placeholder_go_before_the_first_user_turn_with_a_warning():
    value = said("q <image>", "a", images=["1", "2", "3"], system="S")

    conversation, faults = read_conversation(value)

    newline = TextPart("\n")
    front = (ImagePart("1"), newline, ImagePart("2"))
    assert conversation.turns[1].parts == (*front, TextPart("\nq "), ImagePart("3"))
    assert [(fault.kind, fault.grade) for fault in faults] == [("unplaced_pictures", "warning")]


def test_more_placeholders_than_pictures_are_an_error_that_names_a_misspelt_key():
    value = said("<image>q", "a", imges=["a.png"])

    with pytest.raises(VltrainError, match=r"record 0 pictures \(`imges` is near it\)"):
        conversation_from_record(value, lenient=True)


def test_placeholders_of_a_text_only_list_are_text_to_a_lenient_reading():
    value = record("Say <image>.", "a")

    assert kinds(value) == ["missing_pictures"]
    assert first_parts(value, lenient=True) == (TextPart("Say <image>."),)
    assert first_parts(value, format="qwen_vl") == (TextPart("Say <image>."),)


def test_picture_tags_in_messages_are_refused():
    value = said("<img>a.png</img>q", "a")

    assert kinds(value) == ["picture_markup"]
    for lenient in (False, True):
        with pytest.raises(VltrainError, match=r"set data\.format: qwen_vl to read the tags"):
            conversation_from_record(value, lenient=lenient)


@pytest.mark.parametrize(
    ("key", "format"),
    [("conversations", "auto"), ("conversations", "qwen_vl"), ("messages", "qwen_vl")],
)
def test_picture_tags_are_pictures_under_conversations_and_where_the_format_says_so(key, format):
    value = said("<img>a.png</img>q", "a", key=key)

    assert first_parts(value, format=format) == (ImagePart("a.png"), TextPart("q"))


def test_picture_tags_in_a_text_part_are_no_picture():
    value = said([text("<img>a.png</img>")], "a")

    conversation, faults = read_conversation(value)

    assert conversation.image_sources == ()
    assert [fault.kind for fault in faults] == ["picture_markup"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"messages": {}}, "no_conversations"),
        ({"messages": []}, "empty_conversation"),
        ({"mesages": []}, "no_conversations"),
        (said(None, "a"), "bad_turn"),
        (said({"text": "q"}, "a"), "bad_turn"),
        ({"messages": [{"roel": "user", "content": "q"}]}, "bad_turn"),
        ({"messages": [{"role": "user", "contents": "q"}]}, "bad_turn"),
        ({"messages": [{"role": "tool", "content": "q"}]}, "role"),
        (said(["q"], "a"), "bad_part"),
        (said([{"type": "video", "video": "a.mp4"}], "a"), "bad_part"),
        (said([{"type": "text"}], "a"), "bad_part"),
        (said([{"type": "image", "image": {"bytes": "xx"}}], "a"), "bad_part"),
        (said([{"type": "image_url", "image_url": {}}], "a"), "bad_part"),
        (said([{"type": "image"}, text("q")], "a"), "missing_pictures"),
        (said("<image>q", "a"), "missing_pictures"),
        (said("<image><image>q", "a", images=["a.png"]), "missing_pictures"),
        (said("<image>q", "a", images=[["a.png"]]), "bad_pictures"),
        (said("<image>q", "a", images=[{"bytes": "xx"}]), "bad_pictures"),
    ],
)
def test_what_cannot_be_read_in_other_formats_is_refused_by_both_readings(value, kind):
    assert kind in kinds(value)
    for lenient in (False, True):
        with pytest.raises(VltrainError):
            conversation_from_record(value, lenient=lenient)


def test_pictures_are_not_counted_while_a_turn_is_unknown():
    value = said("<image>q", "a", images=["a.png", "b.png"])
    value["messages"][0]["role"] = "tool"

    assert kinds(value) == ["role"]


def test_a_key_that_is_null_does_not_hide_the_one_that_holds_the_turns():
    value = {"conversations": None, **said("q", "a")}

    assert [turn.text for turn in conversation_from_record(value).turns] == ["q", "a"]


@pytest.mark.parametrize(
    "value",
    [
        said([{"type": "image", "image": " "}, text("q")], "a"),
        said("<image>q", "a", images=[""]),
        said("<image>q", "a", image=" "),
    ],
)
def test_a_picture_without_a_path_is_refused(value):
    assert kinds(value) == ["empty_path"]


def test_the_error_names_the_key_that_was_meant_in_messages():
    with pytest.raises(VltrainError, match=r"no `messages` \(`mesages` is near it\)"):
        conversation_from_record({"mesages": []})
    with pytest.raises(VltrainError, match=r"no `content` \(`contents` is near it\)"):
        conversation_from_record({"messages": [{"role": "user", "contents": "q"}]})
