"""Answers of a real tiny model, and what of its tokens becomes text."""

from pathlib import Path

import pytest
import torch
from tiny import write_qwen_vl

from vltrain.evaluation.generation import Decoding, Prompt, answer_batches, answer_text, left_padded
from vltrain.models import load_model, load_processor

# Ids of the toy vocabulary: bytes are their own ids, special tokens follow from 256 on.
END_OF_TEXT, TURN_START, TURN_END, EXTRA = 256, 257, 258, 259
REF, REF_END, BOX, BOX_END = 464, 465, 466, 467


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def model(folder: Path):
    return load_model(folder)


@pytest.fixture(scope="module")
def processor(folder: Path):
    return load_processor(folder)


def picture_prompt(processor, text: str, seed: int) -> Prompt:
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(seed))
    return Prompt([*processor.image_ids("a.png"), *processor.text_ids(text)], lambda: pixels)


@pytest.fixture
def prompts(processor) -> list[Prompt]:
    return [
        Prompt(processor.text_ids("a rather long question without a picture")),
        picture_prompt(processor, "what?", seed=1),
        Prompt(processor.text_ids("short")),
        picture_prompt(processor, "what is in the other picture?", seed=2),
        Prompt(processor.text_ids("and one more")),
    ]


def test_rows_are_padded_on_the_left():
    input_ids, attention_mask = left_padded([[1, 2, 3], [4]], pad_id=9)

    assert input_ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_batches_answer_as_each_prompt_alone_and_in_order(model, processor, prompts):
    together = list(answer_batches(model, processor, prompts, batch_size=5, decoding=Decoding(8)))
    alone = list(answer_batches(model, processor, prompts, batch_size=1, decoding=Decoding(8)))

    assert together == alone
    assert len(set(alone)) == len(prompts)


def test_answers_are_greedy_though_the_checkpoint_samples(model, processor, prompts):
    assert model.generation_config.do_sample

    ids = list(prompts[0].input_ids)
    for _ in range(4):  # the likeliest token, by hand
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))

    (answer,) = answer_batches(model, processor, prompts[:1], batch_size=1, decoding=Decoding(4))
    assert answer == answer_text(ids[-4:], processor)


def test_a_place_for_a_picture_is_never_said(folder, processor, prompts):
    model = load_model(folder)
    with torch.no_grad():  # every hidden state now points at <imgpad>, id 472
        model.lm_head.weight[472] = 100 * model.lm_head.weight.abs().sum(0)
        model.transformer.ln_f.weight.abs_()
        model.lm_head.weight.abs_()

    (answer,) = answer_batches(model, processor, prompts[:1], batch_size=1, decoding=Decoding(3))

    assert "<imgpad>" not in answer


def test_a_model_in_training_mode_is_put_into_eval_mode(model, processor, prompts):
    model.train()

    list(answer_batches(model, processor, prompts[:1], batch_size=1, decoding=Decoding(1)))

    assert not model.training


def test_no_prompts_have_no_answers(model, processor):
    assert list(answer_batches(model, processor, [], batch_size=4, decoding=Decoding(4))) == []


def test_more_prompts_than_a_window_are_all_answered(model, processor):
    prompts = [Prompt(processor.text_ids(f"question {number}")) for number in range(11)]

    answers = list(answer_batches(model, processor, prompts, batch_size=1, decoding=Decoding(2)))

    assert len(answers) == 11


def test_an_answer_ends_where_the_turn_ends(processor):
    assert answer_text([*b"four", TURN_END, *b"more"], processor) == "four"


def test_an_answer_ends_at_the_end_of_text(processor):
    assert answer_text([*b"four", END_OF_TEXT, END_OF_TEXT], processor) == "four"


def test_an_answer_ends_where_another_turn_begins(processor):
    assert answer_text([*b"four", TURN_START, *b"user"], processor) == "four"


def test_an_answer_without_an_end_is_all_that_was_said(processor):
    assert answer_text(b" four\n", processor) == " four\n"


def test_an_answer_keeps_its_boxes_and_loses_control_tokens(processor):
    ids = [EXTRA, REF, *b"cat", REF_END, BOX, *b"(1,2),(3,4)", BOX_END]

    assert answer_text(ids, processor) == "<ref>cat</ref><box>(1,2),(3,4)</box>"
