"""Conversations laid out as ids, and which of them are learned."""

import json
import re
from pathlib import Path

import pytest
from letters import END, IMG, IMG_END, IMGPAD, NEWLINE, START, LetterProcessor, letters, record

from vltrain.data import encode
from vltrain.data.conversation import ImagePart, TextPart, Turn
from vltrain.data.encoding import Segment, ids_and_labels, prompt_ids
from vltrain.data.formats import parts_of
from vltrain.errors import VltrainError
from vltrain.models.qwen_vl.processing import QwenVLImageProcessor, QwenVLProcessor
from vltrain.models.qwen_vl.tokenization import QwenVLTokenizer

LETTERS = LetterProcessor()
TOKENS = Path(__file__).parents[1] / "golden" / "tokens"
GOLDEN = {s["id"]: s for s in json.loads((TOKENS / "samples.json").read_text())["samples"]}
MAKE_CONTEXT = json.loads((TOKENS.parent / "tokenizer" / "make_context.json").read_text())
# Without those that have no turns, or whose history the original cuts to a window.
PROMPTS = [c for c in MAKE_CONTEXT if not {"chat_format", "max_window_size"} & c["input"].keys()]
READ_HERE = {"role_system", "image_path_special_inside"}  # the original fails on these
PARSED_THERE = re.compile(r"<\|\w+\|>|<imgpad>")  # control tokens in what somebody wrote
IMG_ID, IMG_END_ID, IMGPAD_ID = 151857, 151858, 151859


def hidden(ids):
    return [-100] * len(ids)


SYSTEM = [START, *letters("system"), NEWLINE, *letters("S"), END, NEWLINE]


def test_labels_hide_everything_but_the_learned_segment():
    segments = [Segment((1, 2), learn=False), Segment((7, 8), learn=True)]

    input_ids, labels = ids_and_labels(segments)

    assert input_ids == [1, 2, 7, 8]
    assert labels == [-100, -100, 7, 8]


def test_the_assistant_policy_learns_the_answer_and_its_end():
    sample = encode(record("q", "ok"), LETTERS)

    question = [START, *letters("user"), NEWLINE, *letters("q"), END, NEWLINE]
    head = [START, *letters("assistant"), NEWLINE]
    assert sample.input_ids == SYSTEM + question + head + [*letters("ok"), END, NEWLINE]
    assert sample.labels == [*hidden(SYSTEM + question + head), *letters("ok"), END, -100]
    assert sample.learned_tokens == 3


def test_the_reference_policy_also_learns_the_frame_of_every_turn():
    sample = encode(record("q", "ok"), LETTERS, labels="reference")

    assert sample.labels == [
        *[START, *hidden(letters("system")), -100, -100, END, NEWLINE],
        *[START, *hidden(letters("user")), -100, -100, END, NEWLINE],
        *[START, *hidden(letters("assistant")), -100, *letters("ok"), END, NEWLINE],
    ]


def test_a_picture_becomes_image_tokens_that_are_not_learned():
    sample = encode(record("<img> cat.png </img>q", "a"), LETTERS)

    picture = sample.input_ids.index(IMG)
    assert sample.input_ids[picture : picture + 5] == [IMG, IMGPAD, IMGPAD, IMG_END, ord("q")]
    assert sample.labels[picture : picture + 5] == [-100] * 5
    assert sample.images == ["cat.png"]


@pytest.mark.parametrize(
    ("policy", "learned"),
    [("assistant", [-100] * 4), ("reference", [IMG, -100, -100, IMG_END])],
)
def test_the_tags_of_an_assistants_picture_are_learned_under_reference_alone(policy, learned):
    sample = encode(record("draw", "<img>cat.png</img>"), LETTERS, labels=policy)

    picture = sample.input_ids.index(IMG)
    assert sample.labels[picture : picture + 4] == learned


@pytest.mark.parametrize("policy", ["assistant", "reference"])
def test_nothing_of_a_turn_with_weight_0_is_learned(policy):
    value = record("q", "shown", "q", "a")
    value["conversations"][1]["weight"] = 0
    head = [START, *letters("assistant"), NEWLINE]

    sample = encode(value, LETTERS, labels=policy)
    learned = encode(record("q", "shown", "q", "a"), LETTERS, labels=policy)

    start = len([*SYSTEM, START, *letters("user"), NEWLINE, *letters("q"), END, NEWLINE])
    end = start + len([*head, *letters("shown"), END, NEWLINE])
    assert sample.input_ids == learned.input_ids
    assert sample.labels[start:end] == [-100] * (end - start)
    assert sample.labels[:start] == learned.labels[:start]
    assert sample.labels[end:] == learned.labels[end:]


def test_a_system_turn_of_the_record_stands_in_place_of_the_default():
    value = record("q", "a")
    value["conversations"].insert(0, {"from": "system", "value": "T"})

    assert encode(value, LETTERS).input_ids[: len(SYSTEM)] == [
        *[START, *letters("system"), NEWLINE, *letters("T"), END, NEWLINE]
    ]


def test_a_family_without_a_default_system_has_no_system_turn():
    sample = encode(record("q", "a"), LetterProcessor(default_system=None))

    assert sample.input_ids[:6] == [START, *letters("user"), NEWLINE]


def test_a_sample_that_just_fits_is_whole():
    length = len(encode(record("q", "a"), LETTERS).input_ids)

    assert len(encode(record("q", "a"), LETTERS, max_length=length).input_ids) == length


def test_a_sample_that_is_too_long_is_refused_and_never_cut():
    value = record("<img>a.png</img><img>b.png</img>q", "a", id="17")

    with pytest.raises(VltrainError) as caught:
        encode(value, LETTERS, max_length=41)

    assert str(caught.value) == (
        "record '17': 42 tokens (2 images of them take 8), data.max_length is 41\n"
        "  fix: raise data.max_length to 42 or more, or set data.too_long: drop"
    )


def test_an_unknown_label_policy_is_refused():
    with pytest.raises(VltrainError, match="'all' is unknown\n  fix: write assistant or reference"):
        encode(record("q", "a"), LETTERS, labels="all")


def test_encoding_opens_no_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert encode(record("<img>nowhere.png</img>", "a"), LETTERS).images == ["nowhere.png"]


def test_a_prompt_is_what_a_sample_holds_up_to_its_answer():
    question = Turn("user", (ImagePart("cat.png"), TextPart("q")))

    prompt = prompt_ids([question], LETTERS)

    sample = encode(record("<img>cat.png</img>q", "ok"), LETTERS)
    assert prompt == sample.input_ids[: -len([*letters("ok"), END, NEWLINE])]


@pytest.fixture(scope="module")
def processor(qwen_vocabulary):
    return QwenVLProcessor(QwenVLTokenizer(str(qwen_vocabulary)), QwenVLImageProcessor())


def with_placeholders(ids):
    """The original's ids with the path's bytes as image tokens; the places of those."""
    ids, places, inside = list(ids), [], False
    for place, token in enumerate(ids):
        inside = inside and token != IMG_END_ID
        if inside:
            ids[place] = IMGPAD_ID
            places.append(place)
        inside = inside or token == IMG_ID
    return ids, places


def same_for_both(sample):
    """Did the original read it, and without control tokens out of what somebody wrote?"""
    written = "".join(turn["value"] for turn in sample["conversations"])
    return not sample["error"] and not PARSED_THERE.search(written)


@pytest.mark.parametrize("name", [name for name, s in GOLDEN.items() if same_for_both(s)])
def test_ids_and_labels_are_the_originals_under_reference(name, processor):
    golden = GOLDEN[name]

    sample = encode({"conversations": golden["conversations"]}, processor, labels="reference")

    ids, places = with_placeholders(golden["input_ids"])
    labels = [-100 if n in places else label for n, label in enumerate(golden["labels"])]
    assert sample.input_ids == ids
    assert sample.labels == labels


@pytest.mark.parametrize("name", [name for name, s in GOLDEN.items() if s["error"]])
def test_what_the_original_fails_on_is_refused_or_read_whole(name, processor):
    value = {"conversations": GOLDEN[name]["conversations"]}
    if name in READ_HERE:
        assert encode(value, processor).learned_tokens > 0
    else:
        with pytest.raises(VltrainError):
            encode(value, processor, labels="reference")


@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: case["input"]["query"][:5])
def test_a_prompt_has_the_ids_that_the_original_asks_with(case, processor):
    written = [("system", case["input"]["system"])]
    for question, answer in case["input"]["history"] or []:
        written += [("user", question), ("assistant", answer)]
    written.append(("user", case["input"]["query"]))

    prompt = prompt_ids([Turn(role, parts_of(text, role)[0]) for role, text in written], processor)

    assert prompt == with_placeholders(case["out"]["result"]["context_tokens"])[0]


@pytest.mark.parametrize("policy", ["assistant", "reference"])
@pytest.mark.parametrize("written", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<imgpad>"])
def test_control_tokens_that_somebody_wrote_stay_text(policy, written, processor):
    sample = encode(record(f"a {written} b", "ok"), processor, labels=policy)

    plain = encode(record("a b", "ok"), processor, labels=policy)
    control = {151643, 151644, 151645, IMGPAD_ID}
    assert [i for i in sample.input_ids if i in control] == [
        i for i in plain.input_ids if i in control
    ]


def test_a_system_message_is_laid_out_as_the_original_does(processor):
    cases = json.loads((TOKENS / "system_message.json").read_text())["cases"]
    for system in (text for text in cases if not PARSED_THERE.search(text)):
        golden = cases[system]
        value = record("hi", "yo")
        value["conversations"].insert(0, {"from": "system", "value": system})

        sample = encode(value, processor, labels="reference")

        length = len(sample.input_ids)
        assert golden["input_ids"][:length] == sample.input_ids
        assert set(golden["input_ids"][length:]) <= {151643}
        assert golden["labels"][:length] == sample.labels
