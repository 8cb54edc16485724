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
from vltrain.training.memory import GIB, estimate
from vltrain.training.moments import Work
from vltrain.training.optimizer_bytes import Optimizer

PICTURE = 258  # tokens of one, which are not learned


@pytest.fixture(scope="module")
def lora() -> Census:
    """Adapters of rank 64 with dropout on a frozen Qwen-VL."""
    model = skeleton(QWEN_VL, QwenVLConfig(), torch.bfloat16)
    return take_census(add_lora(model, QWEN_VL, FreezeConfig(), Adapter(), seed=0), QWEN_VL)


def estimated(census: Census, tokens: int, samples: int, compute: Compute) -> float:
    """GiB of steps of 8 samples with so many in a batch."""
    batch = BatchSizes(1, samples * tokens, samples * (tokens - PICTURE), samples)
    work = Work(compute, Optimizer("adamw_torch_fused"), accumulates=samples < 8)
    return estimate(census, QwenVLConfig().model_sizes(), batch, work).total / GIB


@pytest.mark.parametrize(
    ("tokens", "samples", "every", "kept", "measured"),
    [
        (384, 8, 0, 1.0, 34.9),
        (512, 8, 0, 1.0, 40.0),
        (1024, 8, 0, 1.0, 60.7),
        (2048, 4, 0, 1.0, 61.4),
        (2048, 8, 0, 0.5, 63.1),
        (2048, 8, 2, 1.0, 65.1),
        (2048, 8, 1, 1.0, 28.1),
        (2048, 1, 1, 1.0, 21.2),
    ],
)
def test_packed_and_compiled_steps_take_what_was_measured(
    lora: Census, tokens: int, samples: int, every: int, kept: float, measured: float
):
    # When this was measured packed rows kept the projection too, as one row does without packing.
    compute = Compute(2, "sdpa", every > 0, every or 1, kept_share=kept, compiled=True)

    assert estimated(lora, tokens, samples, compute) == pytest.approx(measured, rel=0.006)


@pytest.mark.parametrize(
    ("samples", "attention", "every", "compiled", "measured"),
    [
        (1, "sdpa", 1, False, 20.5),
        (1, "sdpa", 0, False, 23.5),
        (1, "sdpa", 1, True, 20.3),
        (8, "packed", 1, False, 21.5),
    ],
)
def test_each_lever_alone_takes_what_was_measured(
    lora: Census, samples: int, attention, every: int, compiled: bool, measured: float
):
    compute = Compute(2, attention, every > 0, every or 1, compiled=compiled)

    assert estimated(lora, 512, samples, compute) == pytest.approx(measured, rel=0.01)
