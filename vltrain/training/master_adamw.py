"""AdamW over bfloat16 weights of which it keeps a float32 master each.

Forward and backward read and write bfloat16 alone: nothing is cast on the way. The step is that of
torch's AdamW on the masters, so no update is lost, and the weights are the masters, rounded. As
many bytes a weight as float32 takes with its gradient: 2 + 2 + 4, and 8 for the moments.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from transformers import TrainingArguments

CHUNK = 2**26  # weights whose gradients are float32 at the same time
FLOAT_STATES = ("master", "exp_avg", "exp_avg_sq")


class MasterAdamW(torch.optim.Optimizer):
    """torch's fused AdamW on float32 masters of bfloat16 weights."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """As `torch.optim.AdamW`; all parameters are bfloat16."""
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step on all weights that have a gradient."""
        for group in self.param_groups:
            for pieces in self._batches(p for p in group["params"] if p.grad is not None):
                _step(pieces, group)

    def master(self, weight: Tensor) -> Tensor | None:
        """The float32 that a weight is the rounding of; None before its first step."""
        return self.state.get(weight, {}).get("master")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state; torch alone would round it to the weights' dtype."""
        super().load_state_dict(state_dict)
        weights = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for number, weight in zip(numbers, weights, strict=True):
            saved = state_dict["state"].get(number, {})
            for name in FLOAT_STATES:
                if name in saved:
                    self.state[weight][name] = saved[name].to(weight.device, copy=True)

    def _batches(self, weights: Iterable[Tensor]) -> Iterator[list["Piece"]]:
        """Pieces of weights, of at most `CHUNK` numbers together."""
        batch: list[Piece] = []
        count = 0
        for weight in weights:
            state = self._state_of(weight)
            state["step"] += 1
            flat = [weight.data.view(-1), weight.grad.reshape(-1)]
            flat += [state[name].view(-1) for name in FLOAT_STATES]
            for start in range(0, weight.numel(), CHUNK):
                piece = [tensor[start : start + CHUNK] for tensor in flat]
                if batch and count + piece[0].numel() > CHUNK:
                    yield batch
                    batch, count = [], 0
                batch.append((*piece, state["step"] - 1))
                count += piece[0].numel()
        if batch:
            yield batch

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["master"] = weight.detach().float().contiguous()
            state["exp_avg"] = torch.zeros_like(state["master"])
            state["exp_avg_sq"] = torch.zeros_like(state["master"])
        return state


Piece = tuple[Tensor, ...]
"""Of one weight, flat: weight, gradient, master, both moments; and the steps taken before."""


def _step(pieces: list[Piece], group: dict[str, Any]) -> None:
    """One step of AdamW on pieces of weights, and the weights rounded anew."""
    weights, gradients, masters, first, second, steps = map(list, zip(*pieces, strict=True))
    adamw(
        masters,
        [gradient.float() for gradient in gradients],
        first,
        second,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    torch._foreach_copy_(weights, masters)


def narrow_learned(model: nn.Module) -> None:
    """Hold what learns in bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def masters_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What learns, by name, in float32; {} under another optimizer."""
    inner = getattr(optimizer, "optimizer", optimizer)  # without accelerate around it
    if not isinstance(inner, MasterAdamW):
        return {}
    learned = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    found = ((name, p, inner.master(p)) for name, p in learned)
    return {name: p.detach().float() if wide is None else wide for name, p, wide in found}


def master_optimizer(arguments: TrainingArguments) -> tuple[type, dict[str, Any]]:
    """The optimizer and its settings, as `transformers.Trainer` takes them."""
    return MasterAdamW, {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
    }
