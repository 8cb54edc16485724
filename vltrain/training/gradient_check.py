"""Every adapter learns, or the run stops at its first step."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vltrain.errors import VltrainError

SHOWN = 3  # names of adapters that an error spells out


class AdapterGradients(TrainerCallback):
    """Looks once, before the first step of an optimizer, whether every adapter gets a gradient.

    Some kernels of 4-bit layers give none to what lies below them. The loss still falls, by those
    adapters that are left.
    """

    def __init__(self) -> None:
        self.is_done = False

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Raises VltrainError where some adapters have a gradient and others none."""
        if self.is_done:
            return
        still, total = adapters_without_gradient(model)
        self.is_done = len(still) < total  # else the batch had nothing to learn: look again
        if still and self.is_done:
            raise VltrainError.at(
                "the first step",
                what=f"{len(still)} of {total} adapters got no gradient, such as "
                + ", ".join(still[:SHOWN]),
                fix="name layers in lora.targets that each batch runs through; where the base is "
                "quantized, start from its bf16 checkpoint",
            )


def adapters_without_gradient(model: nn.Module) -> tuple[list[str], int]:
    """Names of learning adapters whose gradient is missing or zero, and how many learn at all.

    The second matrix of an adapter is looked at: it begins at zero, which keeps the gradient from
    the first one.
    """
    second = [(n, p) for n, p in model.named_parameters() if ".lora_B." in n and p.requires_grad]
    still = [name for name, p in second if p.grad is None or not p.grad.any()]
    return still, len(second)
