"""What adapters can be told beside their rank: how they begin, scale, and what learns with them."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import IMAGE_START_ID, write_qwen_vl

from vltrain.config import FreezeConfig
from vltrain.errors import VltrainError
from vltrain.models import load_model
from vltrain.models.adapters import Adapter, add_lora, published_name
from vltrain.models.catalog import QWEN_VL
from vltrain.models.pissa import against_base, double_rank, first_weights
from vltrain.models.quantization import Nf4

PICTURE = torch.tensor([[IMAGE_START_ID, *[IMAGE_START_ID + 2] * 4, IMAGE_START_ID + 1, *b"What?"]])
PIXELS = torch.linspace(-1, 1, 3 * 56 * 56).view(1, 3, 56, 56)
AS_LORA_DOES = FreezeConfig()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("options") / "base")


def adapted(base: Path, freeze: FreezeConfig = AS_LORA_DOES, **shape) -> PeftModel:
    options = {"r": 4, "alpha": 8, "dropout": 0.0} | shape
    return add_lora(load_model(base), QWEN_VL, freeze, Adapter(**options), seed=1)


def learned(model: PeftModel) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def layer(model: PeftModel, name: str = "transformer.h.0.attn.c_attn") -> torch.nn.Module:
    return model.get_base_model().get_submodule(name)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PICTURE, pixel_values=PIXELS).logits


def learn_a_little(model: PeftModel) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.train()(input_ids=PICTURE, pixel_values=PIXELS, labels=PICTURE).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_rslora_scales_by_the_root_of_the_rank(base):
    assert layer(adapted(base)).scaling["default"] == 2.0  # 8 / 4
    assert layer(adapted(base, rslora=True)).scaling["default"] == 4.0  # 8 / root of 4


def test_dora_learns_the_size_of_each_output_by_itself(base):
    model = adapted(base, dora=True)

    magnitudes = [name for name in learned(model) if "lora_magnitude_vector" in name]
    assert len(magnitudes) == 8
    torch.testing.assert_close(logits(model), logits(load_model(base)), rtol=1e-4, atol=1e-4)


def test_dora_sits_on_nf4_as_well(base):
    model = add_lora(
        load_model(base, quantize=Nf4()), QWEN_VL, FreezeConfig(), Adapter(r=4, dora=True), seed=0
    )

    model.train()(input_ids=PICTURE, pixel_values=PIXELS, labels=PICTURE).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "magnitude" in n}
    assert len(grads) == 8
    assert all(grad is not None and grad.any() for grad in grads.values())


def test_ranks_and_alphas_go_by_pattern(base):
    model = adapted(
        base, rank_pattern={"c_attn": 2, r"h\.1\.mlp\.w1": 6}, alpha_pattern={"c_attn": 32}
    )

    ranks = {name: layer(model, f"transformer.{name}").r["default"] for name in (
        *("h.0.attn.c_attn", "h.1.attn.c_attn", "h.0.mlp.w1", "h.1.mlp.w1", "h.0.attn.c_proj"),
    )}  # fmt: skip
    assert list(ranks.values()) == [2, 2, 4, 6, 4]
    assert layer(model).scaling["default"] == 16.0  # 32 / 2


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_no_layer_with_an_adapter_has_is_refused(base, key):
    with pytest.raises(VltrainError, match=rf"lora\.{key}: 'lm_head' is no layer with an adapter"):
        adapted(base, **{key: {"lm_head": 8}})


def test_pissa_begins_at_the_bases_main_directions_and_changes_no_answer(base):
    model = adapted(base, pissa=True)

    weight = load_model(base).get_parameter("transformer.h.0.attn.c_attn.weight")
    rest = layer(model).base_layer.weight
    singular = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(rest)[0], singular[4], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(logits(model), logits(load_model(base)), rtol=1e-3, atol=1e-4)


def test_what_pissa_has_learned_is_saved_as_plain_lora_beside_the_base_as_it_was(base, tmp_path):
    model = adapted(base, pissa=True)
    first = first_weights(model)
    learn_a_little(model)
    expected = logits(model)

    tensors = against_base({n: p for n, p in model.named_parameters() if p.requires_grad}, first)
    double_rank(model.peft_config["default"])
    model.save_pretrained(str(tmp_path), state_dict=tensors)

    again = PeftModel.from_pretrained(load_model(base), str(tmp_path))
    assert again.peft_config["default"].r == 8
    assert again.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-4)
    assert (logits(again) - logits(load_model(base))).abs().max() > 1e-2


def test_pissa_on_quantized_weights_is_refused(base):
    with pytest.raises(VltrainError, match=r"lora\.start"):
        add_lora(
            load_model(base, quantize=Nf4()), QWEN_VL, FreezeConfig(), Adapter(pissa=True), seed=0
        )


@pytest.mark.parametrize("projector", [None, False])
def test_the_vit_learns_whole_beside_lora_and_the_projector_where_asked(base, projector):
    model = adapted(base, FreezeConfig(vision=False, projector=projector))

    whole = {published_name(name) for name in learned(model) if ".lora_" not in name}
    parts = {QWEN_VL.parts.of(name) for name in whole}
    assert "transformer.visual.conv1.weight" in whole
    assert "transformer.visual.positional_embedding" in whole
    assert parts == ({"vision"} if projector is None else {"vision", "projector"})
    assert "transformer.visual.proj" not in whole


def test_a_vit_that_has_learned_comes_back_with_its_adapter(base, tmp_path):
    model = adapted(base, FreezeConfig(vision=False, projector=False))
    learn_a_little(model)
    model.save_pretrained(str(tmp_path))

    again = PeftModel.from_pretrained(load_model(base), str(tmp_path))

    assert torch.equal(logits(again), logits(model))
    before = load_model(base).get_parameter("transformer.visual.conv1.weight")
    after = again.merge_and_unload().get_parameter("transformer.visual.conv1.weight")
    assert not torch.equal(before, after)
