"""In how many bits the weights of a full run lie."""

import pytest

from vltrain.training.full_weights import held_weights

GIB = 2**30
QWEN_VL = {"learned": 7_797_379_072, "frozen": 1_859_556_096}


@pytest.mark.parametrize(
    ("gpu_gib", "expected"),
    [(141, "fp32"), (79.2, "residual"), (64, "stochastic"), (24, "stochastic"), (None, "fp32")],
)
def test_the_most_exact_that_leaves_room_is_taken(gpu_gib, expected):
    gpu_bytes = None if gpu_gib is None else int(gpu_gib * GIB)

    assert held_weights("auto", **QWEN_VL, gpu_bytes=gpu_bytes) == expected


def test_what_a_recipe_says_is_taken_whatever_fits():
    assert held_weights("fp32", **QWEN_VL, gpu_bytes=GIB) == "fp32"
