"""A model's decoder packed to 4 bits, layer by layer, on inputs that it really gets.

What stands before the decoder (embeddings, pictures) runs once for each sample. Then each layer is
packed on what the layers before it, packed already, make of the samples. One layer is on the
device at a time, so a model that does not fit there is packed all the same.

Dimension letters: `L` tokens of a sample, `D` width, `T` learned tokens of all samples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from vltrain.errors import VltrainError
from vltrain.models.family import Family
from vltrain.models.gptq_solver import Codes, InputMoments, output_error, round_to_nearest, solve
from vltrain.models.loss import IGNORE_INDEX

Sample = Mapping[str, Tensor]
"""`input_ids` int64 [1, L], `pixel_values` where it has pictures, `labels` int64 [1, L]."""


@dataclass
class Passage:
    """One sample on its way through the layers."""

    hidden: Tensor  # float [1, L, D], on the CPU
    context: tuple[Any, ...]  # what a layer gets beside it
    named: dict[str, Any]

    def through(self, layer: nn.Module, device: torch.device) -> Tensor:
        """What a layer makes of it, float [1, L, D], on the device."""
        return layer(self.hidden.to(device), *self.context, **self.named)


@dataclass(frozen=True)
class LayerErrors:
    """What packing a layer cost; every error is a share of the size of what it is an error of."""

    layer: int
    hidden: float  # behind this layer, with all before it packed too, on what was held out
    linear: dict[str, float]  # output of each linear layer, on what was calibrated on
    rounding: dict[str, float]  # the same, were each weight rounded by itself


@dataclass
class PackedDecoder:
    """The tensors in the place of the decoder's weights, and what was lost."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerErrors] = field(default_factory=list)
    logits: float = 0.0  # error of the logits of learned tokens that were held out
    perplexity: tuple[float, float] = (0.0, 0.0)  # of those tokens, before and after


class ReachedError(Exception):
    """A forward pass has come as far as it is needed."""


@torch.no_grad()
def pack_decoder(
    model: PreTrainedModel,
    family: Family,
    calibration: Sequence[Sample],
    held_out: Sequence[Sample],
    device: torch.device,
    on_layer: Callable[[LayerErrors], None] = lambda _: None,
) -> PackedDecoder:
    """Pack all linear layers of a model's decoder by GPTQ.

    Args:
        model: in eval mode, on the CPU. Its packed weights are given up: it does not answer
            any more.
        family: says where the decoder is.
        calibration: what inputs are taken from.
        held_out: what errors are measured on.
        device: where it is computed.
        on_layer: told of each layer when it is done.

    Raises:
        VltrainError: weights of a layer, or what it gets, are NaN or infinite.
    """
    layers = model.get_submodule(family.decoder)
    seen = entries(model, family, calibration, device)
    plain = entries(model, family, held_out, device)
    after = [Passage(p.hidden, p.context, p.named) for p in plain]
    made = PackedDecoder()
    for number, layer in enumerate(layers):
        layer.to(device)
        advance(layer, plain, device)
        try:
            packed, linear, rounding = pack_layer(layer, seen, device)
        except ValueError as error:
            raise VltrainError.at(
                f"{family.decoder}.{number}",
                what=f"cannot be packed: {error}",
                fix="see with vltrain verify whether the model is whole, and use other --data",
            ) from error
        for passages in (seen, after):
            advance(layer, passages, device)
        layer.to("cpu")
        for name, codes in packed.items():
            place = f"{family.decoder}.{number}.{name}"
            made.tensors |= _take(layer.get_submodule(name), place, codes)
        made.layers.append(LayerErrors(number, distance(after, plain), linear, rounding))
        on_layer(made.layers[-1])
    labels = [sample["labels"] for sample in held_out]
    made.logits, made.perplexity = _answers(model, family, plain, after, labels, device)
    return made


def entries(
    model: PreTrainedModel, family: Family, samples: Sequence[Sample], device: torch.device
) -> list[Passage]:
    """Samples as the first layer gets them."""
    where, _, own = family.decoder.rpartition(".")
    front = [m for name, m in model.get_submodule(where).named_children() if name != own]
    caught: list[Passage] = []

    def catch(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        caught.append(Passage(args[0].cpu(), args[1:], named))
        raise ReachedError

    hook = model.get_submodule(f"{family.decoder}.0").register_forward_pre_hook(
        catch, with_kwargs=True
    )
    dtype = model.get_input_embeddings().weight.dtype
    try:
        for module in front:
            module.to(device)
        for sample in samples:
            inputs = {name: value.to(device) for name, value in sample.items() if name != "labels"}
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
            _until_reached(lambda inputs=inputs: model(**inputs, use_cache=False))
    finally:
        hook.remove()
        for module in front:
            module.to("cpu")
    return caught


def _until_reached(run: Callable[[], Any]) -> None:
    try:
        run()
    except ReachedError:
        return
    raise AssertionError("the pass went past the module that was to end it")


def advance(layer: nn.Module, passages: Sequence[Passage], device: torch.device) -> None:
    """Take samples through a layer, in place."""
    for passage in passages:
        passage.hidden = passage.through(layer, device).cpu()


def pack_layer(
    layer: nn.Module, passages: Sequence[Passage], device: torch.device
) -> tuple[dict[str, Codes], dict[str, float], dict[str, float]]:
    """Pack a layer's linear layers, those first whose outputs the others get.

    Args:
        layer: on the device; it computes with what the codes stand for afterwards.
        passages: what it gets.

    Returns:
        By the names of its linear layers: the codes, the errors of their outputs, and what these
        would be if each weight were rounded by itself.

    Raises:
        ValueError: a weight or an input is NaN or infinite.
    """
    packed: dict[str, Codes] = {}
    errors: dict[str, float] = {}
    rounding: dict[str, float] = {}
    for names in linear_groups(layer, passages[0], device):
        moments = input_moments(layer, names[0], passages, device)
        for name in names:
            linear = layer.get_submodule(name)
            weight = linear.weight.float()
            packed[name] = codes = solve(weight, moments)
            errors[name] = output_error(weight, codes.weight(), moments)
            nearest = round_to_nearest(weight).weight()
            rounding[name] = output_error(weight, nearest, moments)
            linear.weight.copy_(codes.weight())
    return packed, errors, rounding


def linear_groups(layer: nn.Module, passage: Passage, device: torch.device) -> list[list[str]]:
    """The names of a layer's linear layers in the order they run, together where they get the
    same input."""
    runs: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if runs and runs[-1][0] is args[0]:
                runs[-1][1].append(name)
            else:
                runs.append((args[0], [name]))

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        passage.through(layer, device)
    finally:
        for hook in hooks:
            hook.remove()
    return [names for _, names in runs]


def input_moments(
    layer: nn.Module, name: str, passages: Sequence[Passage], device: torch.device
) -> Tensor:
    """How the inputs of a linear layer go together, float32 [K, K].

    Raises:
        ValueError: one is NaN or infinite.
    """
    linear = layer.get_submodule(name)
    moments = InputMoments(linear.in_features, device)

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        moments.add(args[0])
        raise ReachedError

    hook = linear.register_forward_pre_hook(add)
    try:
        for passage in passages:
            _until_reached(lambda passage=passage: passage.through(layer, device))
    finally:
        hook.remove()
    return moments.mean()


def _take(linear: nn.Module, name: str, codes: Codes) -> dict[str, Tensor]:
    """The tensors of a packed layer; the memory of the plain weight is given back."""
    bias = linear.bias
    if bias is None:
        bias = torch.zeros(linear.out_features, dtype=linear.weight.dtype)
    weight = torch.empty_like(linear.weight, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return {f"{name}.{own}": tensor for own, tensor in codes.tensors(bias).items()}


def distance(found: Sequence[Passage], wanted: Sequence[Passage]) -> float:
    """How far hidden states are from others, as a share of the size of these."""
    pairs = [(f.hidden.float(), w.hidden.float()) for f, w in zip(found, wanted, strict=True)]
    lost = sum(float((f - w).square().sum()) for f, w in pairs)
    return (lost / sum(float(w.square().sum()) for _, w in pairs)) ** 0.5


def _answers(
    model: PreTrainedModel,
    family: Family,
    plain: Sequence[Passage],
    packed: Sequence[Passage],
    labels: Sequence[Tensor],
    device: torch.device,
) -> tuple[float, tuple[float, float]]:
    """The error of logits behind the last layer, and perplexities before and after."""
    tail = nn.Sequential(model.get_submodule(family.last_norm), model.get_output_embeddings())
    tail.to(device)
    lost = size = 0.0
    learned, losses = 0, [0.0, 0.0]
    for before, after, wanted in zip(plain, packed, labels, strict=True):
        targets = wanted[0, 1:].to(device)
        kept = targets != IGNORE_INDEX
        logits = [tail(p.hidden.to(device)[0, :-1][kept]).float() for p in (before, after)]  # T, V
        lost += float((logits[1] - logits[0]).square().sum())
        size += float(logits[0].square().sum())
        learned += int(kept.sum())
        for place, found in enumerate(logits):
            losses[place] += float(F.cross_entropy(found, targets[kept], reduction="sum"))
    tail.to("cpu")
    first, then = (float(torch.tensor(loss / learned).exp()) for loss in losses)
    return (lost / size) ** 0.5, (first, then)
