"""Which parameters learn, in which dtype, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from golden_cases import GOLDEN
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners import lora
from tiny import IMAGE_START_ID, write_qwen_vl
from torch import nn
from transformers import PreTrainedModel

from vltrain.config import FreezeConfig
from vltrain.errors import VltrainError
from vltrain.models import load_model
from vltrain.models.adapters import (
    Adapter,
    PartCount,
    add_lora,
    count_parts,
    let_go_of_originals,
    set_learned,
    widen_learned,
    wrap_plain_layers_first,
)
from vltrain.models.catalog import QWEN_VL
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration

VISUAL = "transformer.visual."
ATTN_POOL = {
    f"{VISUAL}attn_pool.{name}"
    for name in (
        *("pos_embed", "query", "kv_proj.weight", "attn.in_proj_weight", "attn.in_proj_bias"),
        *("attn.out_proj.weight", "attn.out_proj.bias"),
        *("ln_q.weight", "ln_q.bias", "ln_kv.weight", "ln_kv.bias"),
    )
}
PROJECTOR = ATTN_POOL | {f"{VISUAL}{name}" for name in ("ln_post.weight", "ln_post.bias", "proj")}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("adapters") / "base")


def learned(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


AS_LORA_DOES = FreezeConfig()


def adapted(
    base: Path, *, dtype: str = "fp32", freeze: FreezeConfig = AS_LORA_DOES, **shape
) -> PeftModel:
    options = {"r": 4, "alpha": 8, "dropout": 0.0} | shape
    return add_lora(load_model(base, dtype=dtype), QWEN_VL, freeze, Adapter(**options), seed=1)


def loss_of_a_picture(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """The loss of "<img>…</img>What?" in training mode."""
    picture = [IMAGE_START_ID, *[IMAGE_START_ID + 2] * 4, IMAGE_START_ID + 1]
    ids = torch.tensor([[*picture, *b"What?"]])
    pixels = torch.linspace(-1, 1, 3 * 56 * 56).view(1, 3, 56, 56)
    return model.train()(input_ids=ids, pixel_values=pixels, labels=ids).loss


def test_full_learns_all_but_the_vit_and_of_the_projector_what_reads_the_patches(base):
    model = set_learned(load_model(base), QWEN_VL, FreezeConfig())

    names = learned(model)
    assert {name for name in names if name.startswith(VISUAL)} == ATTN_POOL
    rest = {name for name, _ in model.named_parameters() if not name.startswith(VISUAL)}
    assert rest <= names


def test_full_learns_7_797_379_072_parameters_of_the_published_size():
    layout = json.loads((GOLDEN / "layout.json").read_text())
    with torch.device("meta"):
        config = QwenVLConfig.from_published(layout["real_config_chat_rev"])
        model = QwenVLForConditionalGeneration(config)

    counts = count_parts(set_learned(model, QWEN_VL, FreezeConfig()), QWEN_VL)

    assert counts == {
        "vision": PartCount(0, 1_842_770_688),
        "projector": PartCount(76_054_528, 76_054_528 + 8_192 + 16_777_216),
        "language": PartCount(7_721_324_544, 7_721_324_544),
    }
    assert sum(count.learned for count in counts.values()) == 7_797_379_072


def test_full_learns_the_whole_projector_where_a_recipe_says_so(base):
    model = set_learned(load_model(base), QWEN_VL, FreezeConfig(projector=False, language=True))

    assert learned(model) == PROJECTOR


def test_full_learns_the_vit_alone_where_a_recipe_says_so(base):
    freeze = FreezeConfig(vision=False, projector=True, language=True)

    names = learned(set_learned(load_model(base), QWEN_VL, freeze))

    assert f"{VISUAL}conv1.weight" in names
    assert f"{VISUAL}positional_embedding" in names
    assert all(QWEN_VL.parts.of(name) == "vision" for name in names)


def test_a_model_that_is_frozen_whole_is_refused(base):
    with pytest.raises(VltrainError, match="every part is frozen"):
        set_learned(load_model(base), QWEN_VL, FreezeConfig(projector=True, language=True))


def test_lora_sits_on_four_linear_layers_of_each_decoder_layer_and_nowhere_else(base):
    names = learned(adapted(base))

    places = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2")
    assert names == {
        f"base_model.model.transformer.h.{layer}.{place}.lora_{side}.default.weight"
        for layer in (0, 1)
        for place in places
        for side in "AB"
    }


def test_lora_of_rank_64_has_112_197_632_parameters_on_the_published_size():
    with torch.device("meta"):
        model = QwenVLForConditionalGeneration(QwenVLConfig())
        wrapped = add_lora(model, QWEN_VL, FreezeConfig(), Adapter(), seed=1)

    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == 112_197_632


def test_embeddings_learn_whole_beside_lora_when_asked(base):
    whole = {name for name in learned(adapted(base, embeddings=True)) if ".lora_" not in name}

    assert whole == {
        "base_model.model.transformer.wte.modules_to_save.default.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
    }


def test_the_projectors_reader_learns_whole_beside_lora_when_asked(base):
    names = learned(adapted(base, freeze=FreezeConfig(projector=False)))

    copy = "base_model.model.transformer.visual.attn_pool.modules_to_save.default."
    whole = {name for name in names if ".lora_" not in name}
    assert {f"{VISUAL}attn_pool.{name.removeprefix(copy)}" for name in whole} == ATTN_POOL


def test_targets_may_be_named(base):
    names = learned(adapted(base, targets=("mlp.c_proj",)))

    assert len([name for name in names if "transformer.h." in name]) == 2 * 2
    assert all("mlp.c_proj.lora_" in name for name in names)


def test_targets_may_be_a_pattern(base):
    names = learned(adapted(base, targets=r".*\.h\.1\.attn\.c_attn"))

    assert len(names) == 2
    assert all(".h.1.attn.c_attn.lora_" in name for name in names)


def test_targets_that_the_model_lacks_are_refused_by_name(base):
    with pytest.raises(VltrainError, match=r"lora\.targets: (.|\n)*q_proj"):
        adapted(base, targets=("q_proj",))


def test_what_learns_is_float32_beside_a_base_in_bfloat16(base):
    model = adapted(base, dtype="bf16", freeze=FreezeConfig(projector=False), embeddings=True)

    dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_full_learns_in_float32_beside_a_vit_in_bfloat16(base):
    model = set_learned(load_model(base, dtype="bf16"), QWEN_VL, FreezeConfig())
    widen_learned(model)

    dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_a_copy_learns_is_saved_and_is_read_without_the_weights_it_was_made_of(base, tmp_path):
    model = adapted(base, freeze=FreezeConfig(projector=False), embeddings=True)
    loss = loss_of_a_picture(model)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    model.zero_grad()

    let_go_of_originals(model)

    assert not [name for name, _ in model.named_parameters() if ".original_module" in name]
    assert torch.equal(loss_of_a_picture(model), loss)
    loss_of_a_picture(model).backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert torch.equal(parameter.grad, gradients[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.requires_grad)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(loss_of_a_picture(model), loss)
    with model.disable_adapter(), pytest.raises(RuntimeError, match="were let go"):
        loss_of_a_picture(model)


def test_parts_are_counted_and_copies_that_learn_not_twice(base):
    plain = count_parts(load_model(base), QWEN_VL)
    freeze = FreezeConfig(projector=False)

    model = adapted(base, freeze=freeze, embeddings=True)
    counts = count_parts(model, QWEN_VL)

    embeddings = 2 * 480 * 128  # wte and lm_head: 480 ids, width 128
    # c_attn 128 -> 384, attn.c_proj 128 -> 128, w1 and w2 128 -> 128, rank 4, two layers
    adapters = 2 * 4 * ((128 + 384) + 3 * (128 + 128))
    assert counts["adapter"] == PartCount(adapters, adapters)
    assert counts["language"] == PartCount(embeddings, plain["language"].total)
    assert counts["vision"] == PartCount(0, plain["vision"].total)
    # of the projector, ln_post (2 x 128) and proj (128 x 128) do not learn
    projector = plain["projector"].total
    assert counts["projector"] == PartCount(projector - 2 * 128 - 128 * 128, projector)
    let_go_of_originals(model)
    assert count_parts(model, QWEN_VL) == counts


def test_every_adapter_gets_a_gradient_in_the_first_step(base):
    model = adapted(base, embeddings=True, freeze=FreezeConfig(projector=False))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # they begin at zero, which keeps the gradient from lora_A
            parameter.data.fill_(0.01)

    loss_of_a_picture(model).backward()

    without = {n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()}
    assert without == set()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


def test_an_adapter_that_has_not_learned_leaves_the_model_as_it_is(base):
    plain = loss_of_a_picture(load_model(base))

    assert torch.equal(loss_of_a_picture(adapted(base)), plain)


def test_the_same_seed_makes_the_same_adapter(base):
    first = adapted(base).state_dict()
    torch.rand(3)  # whatever was drawn before
    second = adapted(base).state_dict()

    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_quantized_layer_gets_the_adapter_of_its_own_kind():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.ModuleDict({"plain": nn.Linear(8, 8), "quantized": bitsandbytes.nn.Linear4bit(8, 8)})
    model.is_loaded_in_4bit = True
    config = LoraConfig(r=2, target_modules=["plain", "quantized"])

    wrap_plain_layers_first(config)
    inject_adapter_in_model(config, model)

    assert type(model["plain"]) is lora.Linear
    assert type(model["quantized"]) is lora.Linear4bit
