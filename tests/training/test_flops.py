"""How much arithmetic a step is, by hand."""

import torch

from vltrain.training.flops import ModelWork, Weights, matmul_rate

FROZEN = ModelWork(
    layers=Weights(1000, learns=False),
    head=Weights(100, learns=False),
    vision=Weights(50, learns=False),
    projector=Weights(10, learns=False),
    patches=16,
    image_tokens=4,
)
STEP = {"tokens": 20, "learned": 5, "pictures": 2}


def test_a_frozen_decoder_does_4_operations_a_weight_and_a_frozen_tower_2():
    layers, head = 4 * 1000 * 20, 4 * 100 * 5
    vision, projector = 2 * 50 * 2 * 16, 2 * 10 * 2 * 4

    assert FROZEN.step_flops(**STEP) == layers + head + vision + projector


def test_weights_that_learn_do_6():
    learning = ModelWork(
        layers=Weights(1000, learns=True),
        head=Weights(100, learns=True),
        vision=Weights(50, learns=False),
        projector=Weights(10, learns=True),
        patches=16,
        image_tokens=4,
    )
    layers, head = 6 * 1000 * 20, 6 * 100 * 5
    vision, projector = 2 * 50 * 2 * 16, 4 * 10 * 2 * 4  # nothing before the projector learns

    assert learning.step_flops(**STEP) == layers + head + vision + projector


def test_a_tower_that_learns_does_6_and_gradients_go_through_the_projector():
    seeing = ModelWork(
        layers=Weights(0, learns=True),
        head=Weights(0, learns=True),
        vision=Weights(50, learns=True),
        projector=Weights(10, learns=False),
        patches=16,
        image_tokens=4,
    )

    assert seeing.step_flops(**STEP) == 6 * 50 * 2 * 16 + 4 * 10 * 2 * 4


def test_what_is_kept_of_pictures_is_no_work():
    layers, head = 4 * 1000 * 20, 4 * 100 * 5

    assert FROZEN.step_flops(**STEP, skipped=("vision",)) == layers + head + 2 * 10 * 2 * 4
    assert FROZEN.step_flops(**STEP, skipped=("vision", "projector")) == layers + head


def test_the_rate_of_a_device_is_measured():
    rate = matmul_rate(torch.device("cpu"), torch.float32)

    assert 1e8 < rate < 1e14
