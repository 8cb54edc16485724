"""How the repeated layers of a model are run in training: compiled, recomputed, or as they are.

A model's layers are those that transformers marks as its units of recomputation, in any family.
They are alike, so one compilation serves all of them: what is compiled is the class's `forward`,
and the layer is an argument of it. Lengths are symbols from the first call on, so that batches of
other lengths compile nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from vltrain.models.dropout import draw_seeds, forget_seeds, hash_dropouts
from vltrain.models.folded_lora import fold_adapters, set_scales


@dataclass(frozen=True)
class LayerRuns:
    """What is done with layers while they train; in evaluation they run as they are."""

    compiled: bool = False
    recompute_every: int = 0  # each so-many-th layer is recomputed on the way back; 0: none
    kept: float = 1.0  # of what compiled layers keep beside their inputs; the rest is recomputed
    gathered: bool = False  # an engine holds a layer's weights whole only while the layer runs
    backend: str = "inductor"  # of torch.compile

    def recomputes(self, number: int) -> bool:
        """Whether a layer keeps nothing but its input, by its number from 0."""
        return self.recompute_every > 0 and number % self.recompute_every == 0


def arrange_layers(model: nn.Module, runs: LayerRuns) -> None:
    """Run a model's layers so from here on, in place, whatever was arranged before.

    It replaces transformers' own gradient checkpointing, which must not be switched on afterwards.
    Layers that run without gradients, as those of a frozen vision tower, are never recomputed.

    Args:
        model: with adapters or without.
        runs: the arrangement; `LayerRuns()` leaves the layers as their classes have them.
    """
    if runs.compiled:
        _keep(runs.kept, views=not runs.gathered)
    for layers in stacks_of(model):
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = False
            vars(layer).pop("forward", None)
            recomputed = runs.recomputes(number)
            if runs.compiled or recomputed:
                backend = runs.backend if runs.compiled else None
                layer.forward = _Forward(layer, backend=backend, recomputed=recomputed)


def stacks_of(model: nn.Module) -> list[list[nn.Module]]:
    """The repeated layers of a model in their order, kind by kind."""
    stacks: dict[type, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            stacks.setdefault(type(module), []).append(module)
    return list(stacks.values())


def learns(layer: nn.Module) -> bool:
    """Whether anything in a layer does."""
    return any(parameter.requires_grad for parameter in layer.parameters())


def let_gradients_in(hidden_states: Tensor) -> Tensor:
    """A layer's input, whose gradient the way back makes where there is one."""
    if torch.is_grad_enabled() and not hidden_states.requires_grad:
        return hidden_states.detach().requires_grad_()
    return hidden_states


class _Forward:
    """The `forward` of one layer, in the place of its class's."""

    def __init__(self, layer: nn.Module, *, backend: str | None, recomputed: bool) -> None:
        self.layer = layer
        self.plain = type(layer).forward
        self.backend = backend  # None: not compiled
        self.recomputed = recomputed
        self.dropouts = [] if backend is None else hash_dropouts(layer)
        self.adapters = [] if backend is None else fold_adapters(layer)
        self.learns = learns(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer makes of its inputs."""
        if not self.layer.training:
            return self.plain(self.layer, *args, **kwargs)
        if self.recomputed and torch.is_grad_enabled():
            return checkpoint(self._run, *args, use_reentrant=False, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.backend is None:
            return self.plain(self.layer, *args, **kwargs)
        hidden_states, *others = args
        if self.learns:  # the first layer's is for nobody, but without it is another compilation
            hidden_states = let_gradients_in(hidden_states)
        set_scales(self.adapters, hidden_states.device)
        if self.dropouts:
            draw_seeds(self.dropouts, hidden_states.device)
        try:
            run = _compiled(self.plain, self.backend)
            return run(self.layer, hidden_states, *others, **kwargs)
        finally:
            forget_seeds(self.dropouts)


@cache
def compile_fault(device: torch.device) -> str | None:
    """Why something small cannot be compiled for a GPU of this machine, both ways; None where it
    can. It is tried once.

    Compilers may be there and lack what they need: the headers of Python, a driver that they know.
    """
    try:
        with torch.cuda.device(device):
            numbers = torch.ones(8, device=device, requires_grad=True)
            torch.compile(lambda x: x.sin() * 2, dynamic=True)(numbers).sum().backward()
    except torch.OutOfMemoryError:
        return None  # which says nothing of compiling
    except Exception as why:
        return str(why).strip().partition("\n")[0]
    return None


def _keep(share: float, *, views: bool) -> None:
    """Let layers that are compiled from here on keep so much of what their way back reads.

    What is cheapest to compute again, operator by operator, is left out first. Layers that were
    compiled otherwise are forgotten.

    Args:
        share: of what they would keep.
        views: whether views of tensors may be kept, as of weights: they hold memory that an
            engine means to take back.
    """
    if (functorch.activation_memory_budget, functorch.recompute_views) != (share, not views):
        functorch.activation_memory_budget = share
        functorch.recompute_views = not views
        torch._dynamo.reset()


@cache
def _compiled(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """A class's `forward`, compiled once for all layers, with lengths as symbols."""
    return torch.compile(forward, backend=backend, dynamic=True)
