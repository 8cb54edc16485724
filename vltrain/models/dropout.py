"""Dropout of adapters in compiled layers: its mask is a function of two numbers drawn outside.

torch's own draws within the layer. There the compiler keeps mask and result for the way back; and
where it is told to keep less, it draws anew on the way back, so that gradients come out wrong
(pytorch/pytorch#190758, seen in torch 2.11 to 2.13). Here numbers that are drawn before the
layer is called, and a hash of them and of each value's place, say what is dropped. It is cheap
arithmetic that the compiler fuses with what is beside it; a mask that it does not keep comes out
the same again on the way back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)  # "lowbias32" of C. Wellons' hash prospector
BITS = 31  # of a hash that are compared, its sign left out


class HashedDropout(nn.Module):
    """Dropout with probability `p` by the numbers in `seeds`; torch's own where there are none.

    It drops up to 2**32 values of a tensor independently of each other; beyond, masks repeat.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.seeds: Tensor | None = None  # int32 [2]; no buffer, which DDP would share

    def forward(self, x: Tensor) -> Tensor:
        """float [..., D] -> float [..., D], what is kept scaled by 1 / (1 - p)."""
        if not self.training or self.seeds is None:
            return F.dropout(x, self.p, self.training)
        kept = hashes(x, self.seeds) >= round(self.p * 2**BITS)
        return torch.where(kept, x * (1 / (1 - self.p)), 0.0)

    def extra_repr(self) -> str:
        """What `print` shows of the module."""
        return f"p={self.p}"


def hashes(x: Tensor, seeds: Tensor) -> Tensor:
    """int32 in [0, 2**31) of the shape of `x`, evenly spread.

    Args:
        seeds: int32 [2]; others give others.
    """
    width = x.size(-1)
    rows = torch.arange(x.numel() // width, dtype=torch.int32, device=x.device)
    columns = torch.arange(width, dtype=torch.int32, device=x.device)
    mixed = _folded((rows[:, None] * width + columns) ^ seeds[0], 16) * MULTIPLIERS[0]
    mixed = _folded(mixed ^ seeds[1], 15) * MULTIPLIERS[1]
    return (_folded(mixed, 16) & (2**BITS - 1)).view(x.shape)


def _folded(bits: Tensor, by: int) -> Tensor:
    """int32: the value with its own upper bits over the lower ones."""
    return bits ^ ((bits >> by) & (2 ** (32 - by) - 1))


def hash_dropouts(layer: nn.Module) -> list[HashedDropout]:
    """Put hashed dropout in the place of torch's, in all of a layer's adapters, and return it.

    As long as it has no seeds nothing changes.
    """
    from peft.tuners.lora.layer import LoraLayer

    hashed = []
    for module in layer.modules():
        if isinstance(module, LoraLayer):
            for name, dropout in module.lora_dropout.items():
                if type(dropout) is nn.Dropout:
                    dropout = HashedDropout(dropout.p).train(dropout.training)
                    module.lora_dropout[name] = dropout
                if isinstance(dropout, HashedDropout):
                    hashed.append(dropout)
    return hashed


def draw_seeds(dropouts: Sequence[HashedDropout], device: torch.device) -> None:
    """Give each its numbers, of torch's generator for the device."""
    bounds = torch.iinfo(torch.int32)
    shape = (len(dropouts), 2)
    drawn = torch.randint(bounds.min, bounds.max, shape, dtype=torch.int32, device=device)
    for dropout, seeds in zip(dropouts, drawn.unbind(), strict=True):
        dropout.seeds = seeds


def forget_seeds(dropouts: Sequence[HashedDropout]) -> None:
    """Let each be torch's own again."""
    for dropout in dropouts:
        dropout.seeds = None
