"""How much arithmetic a training step is, and how much of it a device can do."""

import statistics
import time
from dataclasses import dataclass

import torch

FORWARD, BACK_THROUGH, OWN_GRADIENT = 2, 2, 2
"""Floating-point operations of a weight for each token that goes through it: forward; back to
what is before it; its own gradient, where it learns."""

GPU_SIDE, CPU_SIDE = 8192, 1024  # of the square matrices whose product is timed
ROUNDS, PRODUCTS = 5, 10


@dataclass(frozen=True)
class Weights:
    """Weights that tokens go through."""

    count: int
    learns: bool

    def flops(self, tokens: float, *, passed_on: bool) -> float:
        """Operations of a step.

        Args:
            tokens: that go through them.
            passed_on: whether something before them learns, so that a gradient goes back through.
        """
        each = FORWARD + BACK_THROUGH * passed_on + OWN_GRADIENT * self.learns
        return each * self.count * tokens


@dataclass(frozen=True)
class ModelWork:
    """The weights of a model, as far as arithmetic goes; adapters are no part of it.

    A frozen decoder under adapters does 4 operations a weight and token, one that learns 6, a
    frozen vision tower 2. Attention's own products and what is recomputed do not count.
    """

    layers: Weights
    head: Weights
    vision: Weights
    projector: Weights
    patches: int  # of a picture
    image_tokens: int  # of a picture

    def step_flops(
        self, *, tokens: float, learned: float, pictures: int, skipped: tuple[str, ...] = ()
    ) -> float:
        """Operations that a step is about, however they are done.

        The vision tower works on patches; the projector is counted on the image tokens that come
        out of it, the head on learned tokens.

        Args:
            tokens, learned, pictures: of the step's samples.
            skipped: "vision" and "projector" where what they make of pictures is kept.
        """
        flops = self.layers.flops(tokens, passed_on=True)
        flops += self.head.flops(learned, passed_on=True)
        if "vision" not in skipped:
            flops += self.vision.flops(pictures * self.patches, passed_on=self.vision.learns)
        if "projector" not in skipped:
            seen = pictures * self.image_tokens
            flops += self.projector.flops(seen, passed_on=self.vision.learns)
        return flops


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of products of large square matrices, measured.

    The median of some rounds, on this very device.
    """
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(ROUNDS + 1):
        _wait(device)
        began = time.perf_counter()
        for _ in range(PRODUCTS):
            left @ right
        _wait(device)
        rates.append(2 * side**3 * PRODUCTS / (time.perf_counter() - began))
    return statistics.median(rates[1:])  # the first round chooses kernels


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
