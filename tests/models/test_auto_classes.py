"""The Auto classes of `transformers`, and a processor as they give it."""

import copy
import pickle

import pytest
import torch
import transformers
from PIL import Image
from tiny import write_qwen_vl

from vltrain.data import encode
from vltrain.models import load_model, load_processor
from vltrain.models.qwen_vl import (
    QwenVLImageProcessor,
    QwenVLProcessor,
    QwenVLTokenizer,
)

PICTURE = Image.new("RGB", (30, 20), "tomato")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_qwen_vl(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def saved(base):
    """The same model, as `save_pretrained` of its parts writes it."""
    load_model(base).save_pretrained(base.parent / "saved")
    load_processor(base).save_pretrained(base.parent / "saved")
    return base.parent / "saved"


@pytest.mark.parametrize(
    ("auto_class", "kind"),
    [
        ("AutoTokenizer", QwenVLTokenizer),
        ("AutoImageProcessor", QwenVLImageProcessor),
        ("AutoProcessor", QwenVLProcessor),
    ],
)
def test_what_was_saved_is_loaded_by_the_auto_classes(saved, auto_class, kind):
    assert type(getattr(transformers, auto_class).from_pretrained(saved)) is kind


def test_a_saved_processor_is_the_same_again(base, saved):
    before, after = load_processor(base), transformers.AutoProcessor.from_pretrained(saved)

    assert after.fingerprint == before.fingerprint
    assert after.picture_side == before.picture_side == 56
    assert after.n_queries == before.n_queries == 4


def test_a_call_lays_out_pictures_and_pads(base):
    processor = load_processor(base)

    inputs = processor(
        images=[PICTURE],
        text=["<img>any.png</img>a<|im_end|>", "b"],
        padding=True,
        return_tensors="pt",
    )

    assert inputs["input_ids"].tolist() == [
        [470, 472, 472, 472, 472, 471, 97, 258],
        [98, *[256] * 7],
    ]
    assert inputs["attention_mask"].tolist() == [[1] * 8, [1, *[0] * 7]]
    expected = processor.image_processor([PICTURE])["pixel_values"]
    assert torch.equal(inputs["pixel_values"], expected)
    assert inputs.keys() == set(processor.model_input_names)


def test_pictures_may_be_lists_for_each_text_or_paths(base, tmp_path):
    PICTURE.save(tmp_path / "a.png")
    processor = load_processor(base)

    inputs = processor(images=[[str(tmp_path / "a.png")], []], text=["<img></img>", "a"])

    assert inputs["input_ids"] == [[470, 472, 472, 472, 472, 471], [97]]
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)


@pytest.mark.parametrize(
    ("arguments", "error", "fault"),
    [
        ({"text": "<img></img>"}, ValueError, "text has 1 <img></img>, images has 0"),
        ({"text": "a", "images": [PICTURE]}, ValueError, "text has 0 <img></img>, images has 1"),
        ({}, ValueError, "give text, images or both"),
        ({"text": "a", "max_length": 5}, TypeError, "takes no max_length"),
    ],
)
def test_a_call_that_cannot_be_meant_is_refused(base, arguments, error, fault):
    with pytest.raises(error, match=fault):
        load_processor(base)(**arguments)


def test_the_chat_template_gives_the_ids_that_a_run_trains_on(base, qwen_vocabulary):
    base_processor = load_processor(base)
    processor = QwenVLProcessor(QwenVLTokenizer(qwen_vocabulary), base_processor.image_processor)
    question, answer = "Where is it? 在哪里", "<ref>It</ref><box>(1,2),(3,4)</box>\n"
    turns = [
        {"from": "user", "value": f"Picture 1: <img>a</img>\nPicture 2: <img>b</img>\n{question}"},
        {"from": "assistant", "value": answer},
        {"from": "user", "value": "And?"},
        {"from": "assistant", "value": "?"},
    ]
    picture = {"type": "image", "image": PICTURE}
    messages = [
        {"role": "user", "content": [picture, picture, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ]

    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )

    trained = encode({"conversations": turns}, processor).input_ids
    (prompt,) = inputs["input_ids"]
    assert [*prompt, *processor.text_ids("?"), processor.turn_end_id, 198] == trained
    assert inputs["pixel_values"].shape == (2, 3, 56, 56)


def test_a_system_turn_takes_the_place_of_the_default(base):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]

    text = load_processor(base).apply_chat_template(messages)

    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_of_a_processor_gives_the_same_ids(base, duplicate):
    processor = load_processor(base)

    again = duplicate(processor)

    assert again.fingerprint == processor.fingerprint
    assert again(text="<img></img>é", images=PICTURE)["input_ids"] == [
        [470, 472, 472, 472, 472, 471, 195, 169]
    ]


def test_a_published_folder_makes_the_auto_classes_ask_for_its_code(base, tmp_path):
    published = write_qwen_vl(tmp_path / "published")
    config = (published / "config.json").read_text()
    auto_map = '{"auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},'
    (published / "config.json").write_text(config.replace("{", auto_map, 1))

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoModelForCausalLM.from_pretrained(published, trust_remote_code=False)
    assert load_model(published).config.model_type == "qwen_vl"
