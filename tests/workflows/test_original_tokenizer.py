"""What else the original's tokenizer and `chat` do, held against recordings of them."""

import json
import unicodedata
from pathlib import Path

import pytest
from golden_cases import GOLDEN, with_image_pads
from PIL import Image

import vltrain
from vltrain.data.grounding import draw_boxes, parse_boxes
from vltrain.data.pictures import LOCAL_PICTURES
from vltrain.errors import VltrainError
from vltrain.evaluation.generation import answer_text, turn_ends
from vltrain.models.qwen_vl import QwenVLImageProcessor, QwenVLProcessor, QwenVLTokenizer
from vltrain.workflows.dialogue import latest_picture, plain_prompt, user_turn


def recorded(name: str) -> list[dict]:
    return json.loads((GOLDEN / "tokenizer" / f"{name}.json").read_text())


BOXES = recorded("fetch_all_box_with_ref")
PICTURES = recorded("fetch_latest_picture")
ANSWERS = recorded("decode_tokens_chatml")["cases"]
STOP_WORDS = recorded("stop_words")
(RAW,) = [case for case in recorded("make_context") if "chat_format" in case["input"]]
# The original reads these; here they are no boxes, since none can lie there.
BEYOND = ("<box>(-1,2),(3,4)</box>", "<box>(999,0),(1000,1001)</box>", "<box>1,2,3,4</box>")


@pytest.fixture(scope="module")
def processor(qwen_vocabulary: Path) -> QwenVLProcessor:
    return QwenVLProcessor(QwenVLTokenizer(qwen_vocabulary), QwenVLImageProcessor())


@pytest.mark.parametrize("case", BOXES, ids=range(len(BOXES)))
def test_a_text_has_the_boxes_of_the_original_or_a_reason(case):
    boxes, reasons = parse_boxes(case["text"])

    if "error" in case["out"] or case["text"] in BEYOND:
        assert boxes == []
        assert len(reasons) == 1
    else:
        found = [{"box": [b.x1, b.y1, b.x2, b.y2], "ref": b.ref} for b in boxes]
        assert found == [{"ref": None, **box} for box in case["out"]["result"]]


@pytest.mark.parametrize("case", PICTURES, ids=range(len(PICTURES)))
def test_the_latest_picture_is_the_originals_unless_an_answer_names_it(case):
    expected = "a.png" if "<img>" in case["response"] else case["out"]["result"]

    assert latest_picture(case["history"] or []) == expected


@pytest.mark.parametrize("case", ANSWERS, ids=range(len(ANSWERS)))
def test_an_answer_is_what_the_original_decodes(case, processor):
    ids, (expected, _) = case["gen_ids"], case["out"]["result"]

    said = answer_text(ids, processor)

    if not unicodedata.is_normalized("NFC", case["query"]):  # the original loses a character
        assert (said, expected) == ("ok", "k")
    elif processor.turn_end_id in ids:
        assert said == expected
    else:  # an answer that was cut: the original loses its last token
        assert said == expected + processor.tokenizer.decode(ids[-1])


def test_an_answer_ends_at_the_stop_words_of_the_original(processor):
    stops = {stop for (stop,) in STOP_WORDS["chatml"]}

    assert set(turn_ends(processor)) == stops | {processor.pad_id}


def test_a_plain_completion_asks_with_the_ids_of_the_original(processor):
    control = "<|im_start|>"  # which is plain text here
    text = RAW["input"]["query"].removesuffix(control)

    prompt = plain_prompt(user_turn(text).parts, processor, LOCAL_PICTURES)

    expected, _ = with_image_pads(RAW["out"]["result"]["context_tokens"][:-1], 151857)
    assert list(prompt.input_ids) == expected


def test_the_boxes_of_an_answer_are_drawn_on_the_picture_that_was_shown_last(tmp_path):
    for name in ("first", "second"):
        Image.new("RGB", (80, 60), "white").save(tmp_path / f"{name}.png")
    second = Image.new("RGB", (100, 50), "black")
    second.save(tmp_path / "second.png")
    answer = "<ref>It</ref><box>(100,100),(500,500)</box><img>third.png</img>"
    history = [("<img>first.png</img>What?", "A wall."), ("<img>second.png</img>Where?", answer)]

    drawn = vltrain.draw_bbox_on_latest_picture(answer, history, image_root=tmp_path)

    assert drawn.size == (100, 50)
    assert drawn.tobytes() == draw_boxes(second, answer).tobytes() != second.tobytes()


def test_without_a_box_or_a_picture_nothing_is_drawn():
    box = "<box>(1,1),(5,5)</box>"

    assert vltrain.draw_bbox_on_latest_picture("A cat.", [("<img>a.png</img>?", "A cat.")]) is None
    assert vltrain.draw_bbox_on_latest_picture(box, [("Where?", box)]) is None


def test_a_picture_that_is_gone_is_told(tmp_path):
    box = "<box>(1,1),(5,5)</box>"

    with pytest.raises(VltrainError, match=r"a\.png"):
        vltrain.draw_bbox_on_latest_picture(box, [("<img>a.png</img>?", box)], image_root=tmp_path)
