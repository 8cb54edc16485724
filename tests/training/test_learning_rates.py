"""Learning rates of parts and of the two halves of an adapter, as an optimizer gets them."""

from pathlib import Path

import pytest
import torch
from tiny import write_qwen_vl

from vltrain.config import FreezeConfig, LearningRates
from vltrain.models import load_model
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.catalog import QWEN_VL
from vltrain.training.learning_rates import rate_of, split_groups

LAYER = "base_model.model.transformer.h.0.attn.c_attn."
VISUAL = "transformer.visual."
COPY = "base_model.model.transformer.visual.modules_to_save.default."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("rates") / "base")


def test_where_all_learn_alike_there_is_nothing_to_part():
    assert rate_of(QWEN_VL, LearningRates(), default=1e-4, plus=None) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer.h.0.mlp.w1.weight", 1e-5),
        ("lm_head.weight", 1e-5),
        (f"{VISUAL}conv1.weight", 2e-6),
        (f"{VISUAL}attn_pool.query", 3e-4),
        (f"{COPY}conv1.weight", 2e-6),
        (f"{COPY}attn_pool.query", 3e-4),
        ("base_model.model.transformer.visual.attn_pool.modules_to_save.default.query", 3e-4),
    ],
)
def test_each_part_learns_at_its_own_rate(name, expected):
    rates = LearningRates(vision=2e-6, projector=3e-4)

    assert rate_of(QWEN_VL, rates, default=1e-5, plus=None)(name) == expected


def test_the_second_half_of_an_adapter_learns_so_many_times_faster():
    rate = rate_of(QWEN_VL, LearningRates(language=1e-5), default=1e-4, plus=16.0)

    assert rate(f"{LAYER}lora_A.default.weight") == 1e-5
    assert rate(f"{LAYER}lora_B.default.weight") == pytest.approx(1.6e-4)


def test_groups_are_parted_by_rate_and_keep_their_weight_decay(base):
    freeze = FreezeConfig(projector=False)
    model = add_lora(load_model(base), QWEN_VL, freeze, Adapter(r=4), seed=0)
    learned = [p for p in model.parameters() if p.requires_grad]
    flat, matrices = ([p for p in learned if (p.dim() == 1) is one] for one in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}], lr=1e-4
    )

    rate = rate_of(QWEN_VL, LearningRates(projector=1e-5), default=1e-4, plus=2.0)
    split_groups(optimizer, model, rate)

    found = {(g["lr"], g["weight_decay"]): len(g["params"]) for g in optimizer.param_groups}
    # 8 adapters; the projector's reader has 5 matrices and 6 vectors, its query among the former
    assert found == {(1e-4, 0.1): 8, (2e-4, 0.1): 8, (1e-5, 0.1): 5, (1e-5, 0.0): 6}
    assert optimizer.param_groups[0]["lr"] == 1e-4
