"""LoRA of compiled layers: `peft`'s arithmetic with the scale folded into the small matrix.

`peft` scales what an adapter adds, as wide as the layer's output. On the way back that makes a
second copy of each output's gradient; and the compiler takes the scale, a Python number, for one
that may change, and builds C++ for it on the host. Folded into `B`, whose cast is a kernel anyway,
it costs nothing: y = W x + (s B) A dropout(x) (arXiv:2106.09685, section 4.1).
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional as F


class FoldedLinear(Linear):
    """A `peft` adapter of a linear layer; all but plain LoRA of one adapter is left to `peft`."""

    folded_scale: Tensor | None = None  # float32 scalar; no buffer, which DDP would share
    folded_from: tuple[float, torch.device] | None = None  # what it is, and where

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """float [..., D] -> float [..., E]."""
        name = _only_adapter(self)
        plain = self.training and not (args or kwargs) and name is not None
        if self.folded_scale is None or not plain or not _is_plain(self, name):
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)
        wide = self.lora_dropout[name](self._cast_input_dtype(x, self.lora_A[name].weight.dtype))
        added = F.linear(self.lora_A[name](wide), self.lora_B[name].weight * self.folded_scale)
        return (result + added).to(result.dtype)


def _only_adapter(layer: Linear) -> str | None:
    """The name of the adapter that is active; None where there are more, or none."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return names[0] if len(names) == 1 else None


def _is_plain(layer: Linear, name: str) -> bool:
    changed = layer.disable_adapters or layer.merged or name in layer.lora_variant
    return not changed and layer.lora_B[name].bias is None


def fold_adapters(layer: nn.Module) -> list[FoldedLinear]:
    """Let the adapters of a layer's linear ones fold their scale, in place; those that do.

    Adapters of quantized layers have classes of their own and stay as they are. Nothing changes
    in evaluation, nor as long as scales are not set.
    """
    for module in layer.modules():
        if type(module) is Linear:
            module.__class__ = FoldedLinear
    return [module for module in layer.modules() if isinstance(module, FoldedLinear)]


def set_scales(adapters: list[FoldedLinear], device: torch.device) -> None:
    """Give each its scale as a tensor, where it is to be computed with: before every forward.

    In evaluation scales are not looked at, and `peft` computes.
    """
    for adapter in adapters:
        name = _only_adapter(adapter)
        if name is None:
            continue
        wanted = (adapter.scaling[name], device)
        if adapter.folded_from != wanted:
            adapter.folded_scale = torch.tensor(wanted[0], device=device)
            adapter.folded_from = wanted
