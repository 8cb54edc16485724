"""Packed layers in a kernel made for answers: the same outputs, and no training."""

import weakref

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from tiny import write_gptq
from transformers import CompileConfig

from vltrain.config import FreezeConfig
from vltrain.evaluation.compiled import CompiledSteps
from vltrain.evaluation.generation import Decoding, Prompt, say
from vltrain.models import load_model, load_processor
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.catalog import QWEN_VL
from vltrain.models.int4_kernels import Int4Linear, use_kernel

LAYER = "transformer.h.0.mlp.c_proj"
IDS = torch.tensor([[*b"What is it?"]])


@pytest.fixture
def packed(tmp_path):
    return write_gptq(tmp_path / "packed"), tmp_path / "packed"


@torch.no_grad()
def put_into_kernel(model):
    """Logits before, how many layers are in the kernel, and logits after."""
    return model(input_ids=IDS).logits, use_kernel(model), model(input_ids=IDS).logits


@pytest.mark.slow
def test_all_packed_layers_answer_as_before(packed):
    model = load_model(packed[1])
    before, made, after = put_into_kernel(model)

    assert made == 10
    assert isinstance(model.get_submodule(LAYER), Int4Linear)
    assert (after - before).norm() < 0.002 * before.norm()


def test_the_kernel_computes_in_the_dtype_of_the_model(packed):
    model = load_model(packed[1], dtype="bf16")
    assert model.get_submodule(LAYER).scales.dtype is torch.float16

    assert use_kernel(model) == 10
    assert model.get_submodule(LAYER).scales_and_shifts.dtype is torch.bfloat16
    assert model(input_ids=IDS).logits.isfinite().all()


def test_what_a_packed_layer_held_is_let_go_at_once(packed):
    model = load_model(packed[1])
    layer = model.get_submodule(LAYER)  # held by somebody, as GPTQModel's layers hold themselves
    codes = weakref.ref(layer.qweight)

    use_kernel(model)

    assert codes() is None


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


def with_adapter(folder, dtype="auto", **options):
    """A packed model with an adapter on it that changes what it says."""
    adapter = Adapter(r=4, alpha=8, **options)
    model = add_lora(load_model(folder, dtype=dtype), QWEN_VL, FreezeConfig(), adapter, seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model.requires_grad_(False).eval()


@pytest.mark.slow
def test_layers_below_an_adapter_are_in_the_kernel_and_the_adapter_counts(packed):
    model = with_adapter(packed[1])
    before, made, after = put_into_kernel(model)
    with torch.no_grad(), model.disable_adapter():
        alone = model(input_ids=IDS).logits

    assert made == 10
    left = {type(m).__name__ for m in model.modules() if "qweight" in m._buffers}
    assert not left
    adapted = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert adapted
    assert all(isinstance(m.get_base_layer(), Int4Linear) for m in adapted)
    assert (after - before).norm() < 0.002 * before.norm()
    assert (alone - before).norm() > 0.05 * before.norm()


@pytest.mark.slow
def test_an_adapter_on_packed_layers_answers_from_a_compiled_step(packed):
    model, processor = with_adapter(packed[1]), load_processor(packed[1])
    prompt = Prompt(processor.text_ids("What is it?"))
    before = say(model, processor, prompt, Decoding(8))
    use_kernel(model)
    graphs = []
    how = CompileConfig(
        backend=lambda graph, _: graphs.append(graph) or graph.forward, mode=None, dynamic=False
    )
    how._compile_all_devices = True

    said = say(model, processor, prompt, Decoding(8), steps=CompiledSteps(model, how))

    assert said == before
    assert len(graphs) == 1
    assert model.hf_quantizer.is_compileable


def test_embeddings_that_learned_in_float32_leave_the_kernel_in_the_dtype_of_the_base(packed):
    model = with_adapter(packed[1], dtype="bf16", embeddings=True)
    assert model.get_input_embeddings().weight.dtype is torch.float32

    assert use_kernel(model) == 10
    kinds = {m.scales_and_shifts.dtype for m in model.modules() if isinstance(m, Int4Linear)}
    assert kinds == {torch.bfloat16}
