"""Packed layers in a kernel made for answers: the same outputs, and no training."""

import pytest
import torch
from tiny import write_gptq

from vltrain.evaluation.generation import Decoding, Prompt, say
from vltrain.models import load_model, load_processor
from vltrain.models.int4_kernels import Int4Linear, use_kernel

LAYER = "transformer.h.0.mlp.c_proj"
IDS = torch.tensor([[*b"What is it?"]])


@pytest.fixture
def packed(tmp_path):
    return write_gptq(tmp_path / "packed"), tmp_path / "packed"


@pytest.mark.slow
def test_all_packed_layers_answer_as_before(packed):
    model = load_model(packed[1])
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        made = use_kernel(model)
        after = model(input_ids=IDS).logits

    assert made == 10
    assert isinstance(model.get_submodule(LAYER), Int4Linear)
    assert (after - before).norm() < 0.002 * before.norm()


def test_the_kernel_computes_in_the_dtype_of_the_model(packed):
    model = load_model(packed[1], dtype="bf16")
    assert model.get_submodule(LAYER).scales.dtype is torch.float16

    assert use_kernel(model) == 10
    assert model.get_submodule(LAYER).scales_and_shifts.dtype is torch.bfloat16
    assert model(input_ids=IDS).logits.isfinite().all()


def test_a_layer_multiplies_the_weight_that_it_stands_for(packed):
    plain, folder = packed
    model = load_model(folder)
    use_kernel(model)
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0))

    out = model.get_submodule(LAYER)(x)

    expected = x @ plain[LAYER].T + model.get_submodule(LAYER).bias
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_answers_otherwise_in_the_kernel_stays_as_it_is(packed, monkeypatch):
    monkeypatch.setattr(Int4Linear, "forward", lambda self, x: x.new_zeros(2, self.out_features))
    model = load_model(packed[1])

    assert use_kernel(model) == 0
    assert not isinstance(model.get_submodule(LAYER), Int4Linear)


def test_a_model_in_the_kernel_can_be_compiled_and_not_trained(packed):
    model = load_model(packed[1])
    assert model.hf_quantizer.is_trainable
    assert not model.hf_quantizer.is_compileable

    use_kernel(model)

    assert model.hf_quantizer.is_compileable
    assert not model.hf_quantizer.is_trainable


def test_it_says_what_it_said(packed):
    model, processor = load_model(packed[1]), load_processor(packed[1])
    prompt = Prompt(processor.text_ids("What is it?"))
    before = say(model, processor, prompt, Decoding(8))

    use_kernel(model)

    assert say(model, processor, prompt, Decoding(8)) == before
