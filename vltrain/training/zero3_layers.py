"""Layers as what ZeRO-3 gathers and gives back: all weights of one at once, around its forward.

By itself it does so module by module, several hundred times in a forward: the host cannot keep up,
and no layer can be compiled, for the gathering is within it. So it is where a run leaves its layers
to transformers.
"""

from typing import Any

from torch import nn

from vltrain.models.layer_runs import learns, let_gradients_in, stacks_of


def gather_by_layers(model: nn.Module) -> None:
    """Have ZeRO-3 gather layer by layer; before it takes the model over.

    Args:
        model: with adapters or without, and gradients on what learns; its layers are those of
            `layer_runs`.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layers in stacks_of(model):
        for layer in layers:
            set_z3_leaf_module(layer, True)
            if learns(layer):
                layer.register_forward_pre_hook(_with_gradient)


def _with_gradient(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Ask for the gradient of a layer's input.

    By that gradient ZeRO-3 tells that those of the layer's weights are there. Without it, as in the
    first layer above embeddings that rest, it would take them before they are computed, as zeros.
    """
    hidden_states, *others = inputs
    return (let_gradients_in(hidden_states), *others)
