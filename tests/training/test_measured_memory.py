"""The estimate beside peaks that were measured at the real size: benchmarks/README.md has them."""

import pytest
import torch

from vltrain.config import FreezeConfig
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.catalog import QWEN_VL
from vltrain.models.census import skeleton, take_census
from vltrain.models.qwen_vl import QwenVLConfig
from vltrain.models.sizes import Census
from vltrain.training.activations import BatchSizes, Compute
from vltrain.training.master_adamw import narrow_learned
from vltrain.training.memory import GIB, estimate
from vltrain.training.moments import Features, Work
from vltrain.training.optimizer_bytes import Optimizer

PICTURE = 258  # tokens of one, which are not learned
KEPT_FEATURES = Features(("vision", "projector"), at_once=1)
FAST = Compute(2, "packed", checkpointing=False, compiled=True, loss_kernels=True)


def census_of_lora(*, narrow: bool = False) -> Census:
    """Adapters of rank 64 with dropout on a frozen Qwen-VL."""
    model = skeleton(QWEN_VL, QwenVLConfig(), torch.bfloat16)
    adapted = add_lora(model, QWEN_VL, FreezeConfig(), Adapter(), seed=0)
    if narrow:
        narrow_learned(adapted)
    return take_census(adapted, QWEN_VL)


@pytest.fixture(scope="module")
def lora() -> Census:
    return census_of_lora()


def estimated(
    census: Census,
    tokens: int,
    samples: int,
    compute: Compute,
    *,
    features: Features | None = None,
    masters: bool = False,
) -> float:
    """GiB of steps of 8 samples with so many in a batch."""
    batch = BatchSizes(1, samples * tokens, samples * (tokens - PICTURE), samples)
    optimizer = Optimizer("adamw_torch_fused", masters=masters)
    work = Work(compute, optimizer, accumulates=samples < 8, features=features)
    return estimate(census, QwenVLConfig().model_sizes(), batch, work).total / GIB


@pytest.mark.parametrize(
    ("tokens", "samples", "measured"),
    [
        (384, 8, 32.645),
        (512, 8, 37.205),
        (1024, 8, 55.443),
        (2048, 8, 91.932),
        (2048, 4, 56.180),
    ],
)
def test_packed_and_compiled_steps_take_what_was_measured(
    lora: Census, tokens: int, samples: int, measured: float
):
    assert estimated(lora, tokens, samples, FAST) == pytest.approx(measured, rel=0.003)


@pytest.mark.parametrize(
    ("tokens", "samples", "measured"),
    [(384, 8, 32.639), (512, 8, 37.200), (1024, 8, 55.444), (2048, 4, 56.177)],
)
def test_steps_with_kept_features_take_what_was_measured(
    lora: Census, tokens: int, samples: int, measured: float
):
    found = estimated(lora, tokens, samples, FAST, features=KEPT_FEATURES)

    assert found == pytest.approx(measured, rel=0.003)


def test_steps_of_adapters_in_bf16_take_what_was_measured():
    found = estimated(census_of_lora(narrow=True), 512, 8, FAST, masters=True)

    assert found == pytest.approx(37.349, rel=0.003)


def test_steps_that_keep_the_input_of_layers_alone_take_what_was_measured(lora: Census):
    around = Compute(2, "packed", compiled=True, loss_kernels=True)

    assert estimated(lora, 2048, 1, FAST.all_recomputed()) == pytest.approx(20.837, rel=0.003)
    assert estimated(lora, 2048, 1, around) == pytest.approx(20.839, rel=0.003)


@pytest.mark.parametrize(
    ("samples", "attention", "every", "measured"),
    [(1, "sdpa", 1, 20.5), (1, "sdpa", 0, 23.5), (8, "packed", 1, 21.5)],
)
def test_steps_that_are_not_compiled_take_what_was_measured(
    lora: Census, samples: int, attention, every: int, measured: float
):
    # When this was measured the loss was computed in blocks on a GPU too.
    compute = Compute(2, attention, every > 0, every or 1)

    assert estimated(lora, 512, samples, compute) == pytest.approx(measured, rel=0.01)
