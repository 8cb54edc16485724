"""A model whose frozen layers are in fp8: which they are, what learns, and how layers compile."""

import pytest
import torch
from tiny import IMAGE_START_ID, QWEN_VL_CONFIG
from torch import Tensor, nn
from torch._dynamo.utils import counters

from vltrain.config import FreezeConfig
from vltrain.errors import VltrainError
from vltrain.models.adapters import Adapter, add_lora, count_parts
from vltrain.models.catalog import QWEN_VL
from vltrain.models.fp8_linear import Fp8Linear
from vltrain.models.fp8_weights import hold_in_fp8, refuse_old_gpu
from vltrain.models.layer_runs import LayerRuns, arrange_layers
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration
from vltrain.training.gradient_check import adapters_without_gradient

LAYERS = 2
LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
PICTURE = [IMAGE_START_ID, *[IMAGE_START_ID + 2] * 4, IMAGE_START_ID + 1]


def adapted_model(
    freeze: FreezeConfig | None = None, adapter: Adapter | None = None, **config: int
) -> nn.Module:
    torch.manual_seed(0)
    model = QwenVLForConditionalGeneration(QwenVLConfig.from_published(QWEN_VL_CONFIG | config))
    model.config.use_cache = False
    shape = adapter or Adapter(r=4, dropout=0.0)
    return add_lora(model, QWEN_VL, freeze or FreezeConfig(), shape, seed=0).train()


def loss_of(model: nn.Module, text: int = 20) -> Tensor:
    torch.manual_seed(text)
    ids = torch.cat([torch.tensor(PICTURE), torch.randint(0, 250, (text,))])[None]
    labels = ids.masked_fill(ids >= 256, -100)
    return model(input_ids=ids, labels=labels, pixel_values=torch.randn(1, 3, 56, 56)).loss


def test_the_decoders_linear_layers_are_in_fp8_and_nothing_else_is():
    everything = Adapter(r=4, embeddings=True)
    model = adapted_model(FreezeConfig(vision=False, projector=False), everything)

    assert hold_in_fp8(model, QWEN_VL) == LAYERS * len(LINEAR)

    held = {name for name, part in model.named_modules() if isinstance(part, Fp8Linear)}
    decoder = "base_model.model.transformer.h"
    adapted = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2")
    assert held == {
        f"{decoder}.{number}.{name}" + (".base_layer" if name in adapted else "")
        for number in range(LAYERS)
        for name in LINEAR
    }


def test_all_weights_are_counted_as_they_were():
    model = adapted_model()
    before = count_parts(model, QWEN_VL)

    hold_in_fp8(model, QWEN_VL)

    assert count_parts(model, QWEN_VL) == before


def test_the_loss_stays_near_and_every_adapter_gets_the_gradient_it_had_to_a_fifth():
    model = adapted_model()
    wanted = loss_of(model)
    wanted.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    hold_in_fp8(model, QWEN_VL)
    found = loss_of(model)
    found.backward()

    assert found.item() == pytest.approx(wanted.item(), rel=0.01)
    assert found.item() != wanted.item()
    assert adapters_without_gradient(model) == ([], 4 * LAYERS)
    learned = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert learned.keys() == gradients.keys()
    for name, gradient in learned.items():
        if "lora_B" in name:
            assert (gradient - gradients[name]).norm() < 0.2 * gradients[name].norm()


def test_layers_that_are_recomputed_teach_what_they_teach_as_they_are():
    model = adapted_model()
    hold_in_fp8(model, QWEN_VL)
    learned = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss_of(model), learned)

    arrange_layers(model, LayerRuns(recompute_every=1))

    torch.testing.assert_close(torch.autograd.grad(loss_of(model), learned), expected)


@pytest.mark.slow
def test_compiled_layers_are_one_graph_for_all_lengths_and_teach_the_same(compilations):
    model = adapted_model()
    hold_in_fp8(model, QWEN_VL)
    learned = [p for p in model.parameters() if p.requires_grad]
    expected = [torch.autograd.grad(loss_of(model, n), learned) for n in (20, 5, 31)]
    arrange_layers(model, LayerRuns(compiled=True, backend="aot_eager"))
    found = [torch.autograd.grad(loss_of(model, 20), learned)]
    warm = counters["stats"]["unique_graphs"]

    found += [torch.autograd.grad(loss_of(model, n), learned) for n in (5, 31)]

    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == warm > 0
    assert not counters["graph_break"]


def test_widths_that_are_not_multiplied_in_fp8_are_refused_by_the_layers_name():
    model = adapted_model(kv_channels=33)

    with pytest.raises(VltrainError, match=r"lora\.base: .*attn\.c_attn is 128 x 396"):
        hold_in_fp8(model, QWEN_VL)

    assert not any(isinstance(part, Fp8Linear) for part in model.modules())


@pytest.mark.parametrize(
    ("capability", "hip", "words"),
    [
        ((8, 0), None, r"A card is of compute capability 8\.0"),
        ((9, 4), "6.4", "A card is an AMD GPU"),
    ],
)
def test_a_gpu_that_does_not_multiply_fp8_is_refused(monkeypatch, capability, hip, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    monkeypatch.setattr(torch.version, "hip", hip)

    with pytest.raises(VltrainError, match=words):
        refuse_old_gpu()


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_ada_hopper_and_what_came_later_multiply_fp8(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    refuse_old_gpu()
