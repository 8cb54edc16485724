"""Adapters in compiled layers: `peft`'s numbers, however the scale is folded in."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from vltrain.models.folded_lora import FoldedLinear, fold_adapters, set_scales

CPU = torch.device("cpu")


def adapted(**settings: object) -> nn.Module:
    """A linear layer with an adapter whose second matrix is not zero any more."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(6, 5)})
    config = LoraConfig(**{"target_modules": ["a"], "r": 3, "lora_alpha": 2} | settings)
    inject_adapter_in_model(config, model, "default")
    model["a"].lora_B["default"].weight.data.normal_()
    return model.train()


def folded(model: nn.Module) -> nn.Module:
    set_scales(fold_adapters(model), CPU)
    return model


def learned(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """An output and the gradients of what learns, and of the input."""
    torch.manual_seed(1)
    x = torch.randn(2, 4, 6, requires_grad=True)
    out = model["a"](x)
    learns = [x, *(p for p in model.parameters() if p.requires_grad)]
    return out.detach(), list(torch.autograd.grad(out.square().sum(), learns))


def assert_equal(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}])
def test_output_and_gradients_are_pefts(settings: dict):
    model = folded(adapted(**settings))

    assert type(model["a"]) is FoldedLinear
    assert_equal(learned(model), learned(adapted(**settings)))


def test_another_scale_is_another_output():
    model = folded(adapted())
    model["a"].folded_scale *= 2

    assert not torch.allclose(learned(model)[0], learned(adapted())[0])


def test_the_scale_is_that_of_the_adapter_that_is_active_now():
    model = folded(adapted())
    inject_adapter_in_model(LoraConfig(target_modules=["a"], r=2, lora_alpha=9), model, "other")
    nn.init.normal_(model["a"].lora_B["other"].weight)
    model["a"].set_adapter("other")
    x = torch.randn(4, 6)

    set_scales([model["a"]], CPU)

    torch.testing.assert_close(model["a"](x), Linear.forward(model["a"], x))


def test_in_evaluation_peft_computes():
    model = folded(adapted())
    model["a"].folded_scale *= 2  # as another adapter's would be
    x = torch.randn(4, 6)

    assert torch.equal(model.eval()["a"](x), Linear.forward(model["a"], x))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_more_than_plain_lora_is_left_to_peft(settings: dict):
    assert_equal(learned(folded(adapted(**settings))), learned(adapted(**settings)))


def test_adapters_that_are_merged_or_switched_off_are_left_to_peft():
    model = folded(adapted())
    x = torch.randn(4, 6)
    together = model["a"](x)

    model["a"].merge()
    torch.testing.assert_close(model["a"](x), together)
    model["a"].unmerge()
    model["a"].enable_adapters(enabled=False)
    assert torch.equal(model["a"](x), model["a"].base_layer(x))


def test_two_active_adapters_are_left_to_peft():
    def both() -> nn.Module:
        model = adapted()
        torch.manual_seed(3)
        inject_adapter_in_model(LoraConfig(target_modules=["a"], r=2), model, "other")
        model["a"].lora_B["other"].weight.data.normal_()
        model["a"].set_adapter(["default", "other"])
        return model

    assert_equal(learned(folded(both())), learned(both()))


def test_layers_without_adapters_and_those_of_other_kinds_keep_their_classes():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Embedding(4, 4), "c": nn.Linear(4, 4)})
    inject_adapter_in_model(LoraConfig(target_modules=["a", "b"]), model, "default")
    kinds = {name: type(module) for name, module in model.named_modules()}

    assert fold_adapters(model) == [model["a"]]
    assert fold_adapters(model) == [model["a"]]
    changed = {n for n, module in model.named_modules() if type(module) is not kinds[n]}
    assert (changed, kinds["a"]) == ({"a"}, Linear)
    assert "folded" not in "".join(model.state_dict())


def test_a_compiler_sees_no_number_of_the_host():
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        seen.extend(inputs)
        return graph

    model = folded(adapted())
    torch.compile(model["a"].forward, backend=backend, dynamic=True)(torch.randn(4, 6))

    assert model["a"].folded_scale in seen
    assert not [x for x in seen if isinstance(x, Tensor) and x.dtype is torch.float64]
