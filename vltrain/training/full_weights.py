"""In how many bits the weights of a full run lie: what is wanted, or what fits."""

from collections.abc import Mapping
from typing import Any, Literal

from transformers import TrainingArguments

HeldWeights = Literal["fp32", "residual", "stochastic"]

# Weight, gradient, moments of AdamW and, where there is one, residual.
BYTES_LEARNED: Mapping[HeldWeights, int] = {
    "fp32": 4 + 4 + 8,
    "residual": 2 + 2 + 2 + 2,
    "stochastic": 2 + 2 + 2,
}
HELD: Mapping[HeldWeights, str] = {
    "residual": "bf16, with what rounding takes from them in 16 bits more",
    "stochastic": "bf16, rounded at random",
}
"""How weights are held that have an optimizer of their own."""

BYTES_FROZEN = 2
ROOM_BYTES = 8 * 2**30  # for activations, logits and what the device keeps to itself


def held_weights(
    wanted: Literal["auto", "fp32", "residual", "stochastic"],
    *,
    learned: int,
    frozen: int,
    gpu_bytes: int | None,
) -> HeldWeights:
    """How learned weights are held.

    Args:
        wanted: as the recipe has it; "auto" is the first of fp32, residual and stochastic that
            leaves room in the GPU's memory, and the last where none does.
        learned: weights that learn.
        frozen: weights that do not.
        gpu_bytes: memory of the GPU; None on a CPU, where "auto" is fp32.
    """
    if wanted != "auto":
        return wanted
    if gpu_bytes is None:
        return "fp32"
    room = gpu_bytes - ROOM_BYTES - frozen * BYTES_FROZEN
    fitting = [held for held, size in BYTES_LEARNED.items() if learned * size <= room]
    return fitting[0] if fitting else "stochastic"


def bf16_optimizer(arguments: TrainingArguments, held: HeldWeights) -> tuple[type, dict[str, Any]]:
    """The optimizer of bfloat16 weights and its settings, as `transformers.Trainer` takes them."""
    from vltrain.training.bf16_adamw import Bf16AdamW  # imports bitsandbytes, for seconds

    settings = {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
    }
    return Bf16AdamW, settings | {"rounding": held}
