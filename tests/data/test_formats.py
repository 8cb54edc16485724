"""Records as people write them, read into conversations."""

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import record

from vltrain.data.conversation import Conversation, ImagePart, TextPart, Turn
from vltrain.data.formats import conversation_from_record, read_conversation
from vltrain.errors import VltrainError


def turns(*pairs):
    return {"conversations": [{"from": role, "value": value} for role, value in pairs]}


def kinds(value):
    return [fault.kind for fault in read_conversation(value)[1]]


def test_a_record_becomes_turns_of_text_and_pictures():
    value = record("Picture 1: <img>cat.png</img>\nWhat?", "A cat.", id="17")

    assert conversation_from_record(value) == Conversation(
        turns=(
            Turn("user", (TextPart("Picture 1: "), ImagePart("cat.png"), TextPart("\nWhat?"))),
            Turn("assistant", (TextPart("A cat."),)),
        ),
        id="17",
    )


def test_human_and_gpt_are_user_and_assistant():
    conversation = conversation_from_record(turns(("human", "q"), ("gpt", "a")))

    assert [turn.role for turn in conversation.turns] == ["user", "assistant"]


def test_a_first_system_turn_is_kept():
    value = turns(("system", "Be terse."), ("user", "q"), ("assistant", "a"))

    assert conversation_from_record(value).turns[0] == Turn("system", (TextPart("Be terse."),))


def test_one_leading_assistant_turn_is_dropped_with_a_warning():
    value = turns(("assistant", "hello"), ("user", "q"), ("assistant", "a"))

    conversation, faults = read_conversation(value)

    assert [turn.text for turn in conversation.turns] == ["q", "a"]
    assert [(fault.kind, fault.grade) for fault in faults] == [("leading_assistant", "warning")]


def test_a_turn_knows_its_place_in_the_record():
    value = turns(("assistant", "hello"), ("user", "q"), ("assistant", "a"))

    assert [turn.position for turn in conversation_from_record(value).turns] == [1, 2]


def test_keys_of_other_tools_are_passed_over():
    value = record("q", "a", source="x")
    value["conversations"][1]["emotion"] = 0

    assert kinds(value) == []


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("text", "not_an_object"),
        (None, "not_an_object"),
        ([{"conversations": []}], "not_an_object"),
        ({"id": 1}, "no_conversations"),
        ({"conversations": "q"}, "no_conversations"),
        ({"conversations": []}, "empty_conversation"),
        ({"conversations": ["q"]}, "bad_turn"),
        ({"conversations": [{"value": "q"}]}, "bad_turn"),
        ({"conversations": [{"from": "user", "value": 3}]}, "bad_turn"),
        ({"conversations": [{"from": ["user"], "value": "q"}]}, "bad_turn"),
        (turns(("bot", "q")), "role"),
        (turns(("User", "q")), "role"),
        (turns(("user", "q"), ("system", "s"), ("assistant", "a")), "order"),
        (turns(("system", "s")), "empty_conversation"),
        (turns(("assistant", "a")), "empty_conversation"),
        (record("<img>a.png", "a"), "unclosed_tag"),
        (record("<img>a<img>b.png</img>", "a"), "nested_tag"),
        (record("<img>a<ref>b</ref>.png</img>", "a"), "nested_tag"),
    ],
)
def test_what_cannot_be_read_is_refused_by_both_readings(value, kind):
    assert kind in kinds(value)
    for lenient in (False, True):
        with pytest.raises(VltrainError):
            conversation_from_record(value, lenient=lenient)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (turns(("user", "q")), "nothing_to_learn"),
        (record("q", ""), "nothing_to_learn"),
        (turns(("user", "q"), ("user", "q"), ("assistant", "a")), "order"),
        (turns(("user", "q"), ("assistant", "a"), ("assistant", "b")), "order"),
        (turns(("assistant", "x"), ("assistant", "y"), ("user", "q"), ("assistant", "a")), "order"),
        (record("q", "a", "and?"), "order"),
        (record("a.png</img>\nq", "a"), "stray_tag"),
        (record("<img></img>q", "a"), "empty_path"),
        (record("<img> </img>q", "a"), "empty_path"),
        (record("q", "<ref>hat<box>(1,2),(3,4)"), "unclosed_tag"),
        (record("q", "<ref>a<ref>b</ref></ref>"), "nested_tag"),
        (record("q", "<ref>a<box></ref>(1,2),(3,4)</box>"), "nested_tag"),
        (record("q", "(1,2),(3,4)</box>"), "stray_tag"),
        (record("<ref>a<img>a.png</img></ref>", "a"), "nested_tag"),
    ],
)
def test_what_the_original_took_is_refused_unless_reading_is_lenient(value, kind):
    assert kind in kinds(value)
    with pytest.raises(VltrainError):
        conversation_from_record(value)
    assert conversation_from_record(value, lenient=True).turns


def test_an_error_names_the_record_and_all_its_faults():
    value = turns(("bot", "q"), ("assistant", "<ref>a"))
    value["id"] = "x1"

    with pytest.raises(VltrainError) as caught:
        conversation_from_record(value)

    assert str(caught.value) == (
        "record 'x1': 2 faults\n"
        "  turn 0 is from 'bot', which is no role\n"
        "    fix: roles are user, assistant and system (first only)\n"
        "  turn 1 (assistant) has <ref> without its end, at character 0: '<ref>a'\n"
        "    fix: write <ref>…</ref>, one after the other"
    )


def test_a_misspelt_key_is_named_with_the_one_that_was_meant():
    with pytest.raises(VltrainError, match=r"no `conversations` \(`conversation` is near it\)"):
        conversation_from_record({"conversation": []})


def test_the_format_that_is_set_wins_over_the_content():
    value = record("Say <image>.", "a")

    assert conversation_from_record(value, format="messages").turns[0].text == "Say <image>."
    with pytest.raises(VltrainError):
        conversation_from_record(value)


def test_an_unknown_format_is_refused():
    with pytest.raises(VltrainError, match="'coco' is unknown\n  fix: write auto, qwen_vl"):
        read_conversation(record("q", "a"), format="coco")


def test_a_system_beside_the_turns_is_the_system_turn():
    value = record("q", "a", system="Be terse.")

    assert conversation_from_record(value).turns[0] == Turn("system", (TextPart("Be terse."),))


def test_an_empty_system_beside_the_turns_is_none():
    value = record("q", "a", system="")

    assert [turn.role for turn in conversation_from_record(value).turns] == ["user", "assistant"]


def test_two_systems_are_refused():
    value = turns(("system", "A"), ("user", "q"), ("assistant", "a")) | {"system": "B"}

    assert kinds(value) == ["order"]


@pytest.mark.parametrize(("weight", "learned"), [(0, False), (0.0, False), (1, True), (None, True)])
def test_the_weight_of_an_assistants_turn_says_whether_it_is_learned(weight, learned):
    value = record("q", "a", "q", "a")
    value["conversations"][1]["weight"] = weight

    assert [turn.learn for turn in conversation_from_record(value).turns] == [
        True,
        learned,
        True,
        True,
    ]


@pytest.mark.parametrize("weight", [0.5, 2, "0", [0]])
def test_a_weight_that_is_neither_0_nor_1_is_refused(weight):
    value = record("q", "a")
    value["conversations"][1]["weight"] = weight

    assert kinds(value) == ["bad_weight"]


def test_answers_that_are_all_shown_alone_are_nothing_to_learn():
    value = record("q", "a")
    value["conversations"][1]["weight"] = 0

    with pytest.raises(VltrainError, match="has a weight above 0: there is nothing to learn"):
        conversation_from_record(value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
WORDS = st.sampled_from(
    [
        *("<img>", "</img>", "<ref>", "</ref>", "<box>", "</box>", "<|im_end|>"),
        *("<image>", "<bbox>", "<ref-object>", "<", "a", " ", "\n"),
    ]
)
TEXTS = st.lists(WORDS, max_size=8).map("".join)
ROLES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "bot"])
PARTS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image", "image_url", "video"]) | JSON_VALUES},
        optional=dict.fromkeys(("text", "image", "image_url"), TEXTS | JSON_VALUES),
    ),
    max_size=3,
)
SPOKEN = st.fixed_dictionaries({"from": ROLES | JSON_VALUES, "value": TEXTS | JSON_VALUES})
SAID = st.fixed_dictionaries(
    {"role": ROLES | JSON_VALUES, "content": TEXTS | PARTS | JSON_VALUES},
    optional={"weight": st.sampled_from([0, 1]) | JSON_VALUES},
)
BESIDE = {
    "images": st.lists(TEXTS | JSON_VALUES, max_size=3) | JSON_VALUES,
    "system": TEXTS | JSON_VALUES,
    "objects": st.fixed_dictionaries(
        {"ref": st.lists(TEXTS) | JSON_VALUES, "bbox": st.lists(JSON_VALUES) | JSON_VALUES}
    )
    | JSON_VALUES,
}
RECORDS = (
    st.fixed_dictionaries({"conversations": st.lists(SPOKEN | SAID, max_size=5)}, optional=BESIDE)
    | st.fixed_dictionaries({"messages": st.lists(SAID, max_size=5)}, optional=BESIDE)
    | st.fixed_dictionaries(
        {"query": TEXTS | JSON_VALUES},
        optional={"response": TEXTS | JSON_VALUES, "history": JSON_VALUES, **BESIDE},
    )
)
FORMATS = st.sampled_from(["auto", "qwen_vl", "messages", "llava", "swift"])


@settings(max_examples=200, deadline=None)
@given(RECORDS | JSON_VALUES, st.booleans(), FORMATS)
def test_any_json_is_read_or_refused_with_a_vltrain_error(value, lenient, format):
    with suppress(VltrainError):
        assert conversation_from_record(value, lenient=lenient, format=format).turns
