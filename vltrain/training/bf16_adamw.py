"""AdamW for weights that lie in bfloat16, in which an update of 1e-5 is not lost.

A bfloat16 has 8 bits of precision: 0.02 and 0.02001 are the same number, and a step of AdamW at a
learning rate of 1e-5 changes nothing. Either of two things makes such steps count:

- `residual`: what rounding takes from a weight is kept beside it in 16 bits. The two together are
  a float32, bit for bit, so nothing is lost at all. 8 bytes a weight with gradient and moments.
- `stochastic`: a weight is rounded up or down at random, so that it is right on average. 6 bytes.

The moments have 8 bits (arXiv:2110.02861) and the step itself is that of `bitsandbytes`.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.optim import AdamW8bit
from torch import Tensor

Rounding = Literal["residual", "stochastic"]

BLOCK = 256  # weights that share a scale of their moments; bitsandbytes' own
CHUNK = BLOCK * 2**16  # weights that are float32 at the same time
HALF = 1 << 15  # of the last place that a bfloat16 keeps of a float32's bits


class Bf16AdamW(AdamW8bit):
    """`AdamW8bit` that loses no update of a bfloat16 weight; other weights it steps as it does."""

    def __init__(self, params: Iterable[Any], *, rounding: Rounding, **settings: Any) -> None:
        """As `torch.optim.AdamW`.

        Args:
            params: parameters or groups of them.
            rounding: see the module. Random bits come from the device's default generator, whose
                state a checkpoint of the Trainer holds.
            settings: `lr`, `betas`, `eps`, `weight_decay`.
        """
        super().__init__(params, **settings)
        self.rounding = rounding
        self.non_castable_tensor_keys.add("residual")  # or loading would make it a float

    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        super().init_state(group, p, gindex, pindex)
        if self.rounding == "residual" and p.dtype == torch.bfloat16:
            self.state[p]["residual"] = torch.zeros_like(p, dtype=torch.int16)

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Take up a saved state.

        Raises:
            ValueError: it belongs to the other rounding.
        """
        super().load_state_dict(state_dict, move_to_device)
        for weight, state in self.state.items():
            expected = self.rounding == "residual" and weight.dtype == torch.bfloat16
            if ("residual" in state) != expected:
                raise ValueError(f"the saved state is not one of {self.rounding} rounding")

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        if p.dtype != torch.bfloat16:
            super().update_step(group, p, gindex, pindex)
            return
        state = self.state[p]
        state["step"] += 1
        weight, gradient = p.data.view(-1), p.grad.contiguous().view(-1)
        for start in range(0, weight.numel(), CHUNK):
            part = slice(start, start + CHUNK)
            residual = state["residual"].view(-1)[part] if "residual" in state else None
            wide = join(weight[part], residual) if residual is not None else weight[part].float()
            self._step(group, state, wide, gradient[part].float(), part)
            if residual is None:
                weight[part] = round_at_random(wide)
            else:
                weight[part], residual[:] = split(wide)

    def _step(
        self,
        group: dict[str, Any],
        state: dict[str, Any],
        wide: Tensor,
        gradient: Tensor,
        part: slice,
    ) -> None:
        """One step of AdamW on a part of a parameter: float32 [n] each, `wide` in place."""
        (beta1, beta2), eps, rate = group["betas"], group["eps"], group["lr"]
        first, second = (state[name].view(-1)[part] for name in ("state1", "state2"))
        if first.dtype == torch.float32:  # as bitsandbytes has it in small parameters
            bnb.optimizer_update_32bit(
                "adam", gradient, wide, first, beta1, eps, state["step"], rate, second, beta2,
                weight_decay=group["weight_decay"],
            )  # fmt: skip
            return
        blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
        bnb.optimizer_update_8bit_blockwise(
            "adam", gradient, wide, first, second, beta1, beta2, 0.0, 0.0, eps, state["step"], rate,
            state["qmap1"], state["qmap2"], state["absmax1"][blocks], state["absmax2"][blocks],
            weight_decay=group["weight_decay"],
        )  # fmt: skip


def join(weight: Tensor, residual: Tensor) -> Tensor:
    """The float32 that a bfloat16 and its 16-bit residual are together; see `split`."""
    return ((weight.view(torch.int16).int() << 16) + residual.int()).view(torch.float32)


def split(wide: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 as the nearest bfloat16 and, as int16, how far its bits are from it.

    Args:
        wide: float32 [n].

    Returns:
        bfloat16 [n] and int16 [n], of which `join` makes the same bits again.
    """
    bits = wide.view(torch.int32)
    upper = (bits + HALF) >> 16
    residual = bits - (upper << 16)
    return upper.to(torch.int16).view(torch.bfloat16), residual.to(torch.int16)


def round_at_random(wide: Tensor) -> Tensor:
    """float32 [n] -> bfloat16 [n], up or down with the odds that make it right on average."""
    noise = torch.randint_like(wide, 1 << 16, dtype=torch.int32)
    upper = (wide.view(torch.int32) + noise) >> 16
    return upper.to(torch.int16).view(torch.bfloat16)
