"""Which parameters learn: full or LoRA. The only place where the methods differ."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, dispatch_default
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel, set_seed

from vltrain.config import FreezeConfig
from vltrain.errors import VltrainError
from vltrain.models.family import Family, Part, has_prefix
from vltrain.models.quantization import fp8_weights, gptq_weights, is_gptq, weight_count
from vltrain.models.shares import is_zero3

PEFT_PREFIX = "base_model.model."
ADAPTER_MARK = ".lora_"
COPY_MARK, ORIGINAL_MARK = ".modules_to_save.", ".original_module."
WRAPPINGS = re.compile(r"\.(?:modules_to_save\.[^.]+|original_module|base_layer)(?=\.|$)")
PLAIN_LAYERS = (nn.Linear, nn.Embedding)  # exactly these: quantized ones are subclasses

CountedPart = Part | Literal["adapter"]


@dataclass(frozen=True)
class Adapter:
    """The shape of a LoRA adapter (arXiv:2106.09685)."""

    r: int = 64
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] | str | None = None  # None: what the family names
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # of layers by name or pattern
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    embeddings: bool = False  # input and output embeddings learn in full
    dora: bool = False
    rslora: bool = False
    pissa: bool = False  # begins at the base's main directions, which leave the base's weights


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part of a model."""

    learned: int
    total: int


def published_name(name: str) -> str:
    """The name that a parameter has without `peft` around it."""
    return WRAPPINGS.sub("", name.removeprefix(PEFT_PREFIX))


def set_learned(model: PreTrainedModel, family: Family, freeze: FreezeConfig) -> PreTrainedModel:
    """Full-parameter training: gradients on what is not frozen, in place.

    Weights keep their dtype: it is for `widen_learned`, or for an optimizer that loses no small
    update of a bfloat16, to see to it that they learn.

    Raises:
        VltrainError: nothing is left to learn.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_learns(name, family, freeze))
    if not any(p.requires_grad for p in model.parameters()):
        raise VltrainError.at(
            "freeze", what="every part is frozen, nothing learns", fix="set one of them to false"
        )
    return model


def widen_learned(model: nn.Module) -> None:
    """Hold what learns in float32, whatever the checkpoint's dtype.

    At a learning rate of 1e-5 most updates of a bfloat16 weight are lost in rounding. Where
    DeepSpeed has shared the model out, its optimizer keeps float32 weights of its own, and all
    must be of one dtype: what has come to the model since is given that of the rest.
    """
    shared = next((p for p in model.parameters() if is_zero3(p)), None)
    for parameter in model.parameters():
        if shared is not None and not is_zero3(parameter):
            parameter.data = parameter.data.to(shared.dtype)
        elif shared is None and parameter.requires_grad:
            parameter.data = parameter.data.float()


def _learns(name: str, family: Family, freeze: FreezeConfig) -> bool:
    part = family.parts.of(name)
    if part == "projector":
        if freeze.projector is None:
            return any(has_prefix(name, p) for p in family.default_projector)
        return not freeze.projector
    return not getattr(freeze, part)


def add_lora(
    model: PreTrainedModel, family: Family, freeze: FreezeConfig, adapter: Adapter, seed: int
) -> PeftModel:
    """LoRA training: adapters on the language model, whole modules beside them where asked.

    Args:
        seed: of the adapters' first weights.

    Raises:
        VltrainError: a combination that cannot work, or layers that the model lacks.
    """
    refuse_impossible(model, adapter)
    config = lora_config(family, freeze, adapter)
    wrap_plain_layers_first(config)
    set_seed(seed)
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise VltrainError.at(
            "lora.targets",
            what=f"no adapter fits the model ({error})",
            fix=f"name linear layers of it; the default is {list(family.lora_targets)}",
        ) from error
    refuse_idle_patterns(wrapped, adapter)
    learn_beside(wrapped, family, freeze)
    return wrapped


def lora_config(family: Family, freeze: FreezeConfig, adapter: Adapter) -> LoraConfig:
    """An adapter's shape in `peft`'s words."""
    targets = family.lora_targets if adapter.targets is None else adapter.targets
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        use_dora=adapter.dora,
        use_rslora=adapter.rslora,
        init_lora_weights="pissa" if adapter.pissa else True,
        modules_to_save=whole_modules(family, freeze, embeddings=adapter.embeddings) or None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def whole_modules(family: Family, freeze: FreezeConfig, *, embeddings: bool) -> list[str]:
    """The modules of which `peft` keeps a copy that learns beside the adapters.

    Parameters of the vision tower that belong to no module of their own are reached only through
    the whole of it; a projector inside it comes along, and `learn_beside` leaves it frozen.
    """
    modules = [] if freeze.vision else list(family.parts.vision)
    if freeze.projector is False:
        modules += [
            name
            for name in family.default_projector
            if not any(has_prefix(name, module) for module in modules)
        ]
    return modules + list(family.embeddings if embeddings else ())


def learn_beside(model: PeftModel, family: Family, freeze: FreezeConfig) -> None:
    """Let of the whole modules learn what is not frozen; all that learns is held in float32."""
    for name, parameter in model.named_parameters():
        plain = published_name(name)
        if COPY_MARK in name and family.parts.of(plain) != "language":
            parameter.requires_grad_(learns_beside(plain, family, freeze))
    widen_learned(model)


def learns_beside(name: str, family: Family, freeze: FreezeConfig) -> bool:
    """Whether a parameter of vision tower or projector, by its published name, learns beside LoRA.

    Where the projector learns, it is the share of it that `vltrain full` trains.
    """
    if family.parts.of(name) == "vision":
        return not freeze.vision
    return freeze.projector is False and any(has_prefix(name, p) for p in family.default_projector)


class LetGo(nn.Module):
    """In the place of a module of the base whose copy learns."""

    def forward(self, *_: Any, **__: Any) -> Any:
        """Raises RuntimeError: there are no weights any more."""
        raise RuntimeError("the base's own weights of a module that learns whole were let go")


def saved_parameters(model: PeftModel) -> list[tuple[str, nn.Parameter]]:
    """What an adapter is saved as: all that learns, and the rest of copies that learn in part."""
    parameters = model.named_parameters()
    return [(name, p) for name, p in parameters if p.requires_grad or COPY_MARK in name]


def let_go_of_originals(model: nn.Module) -> None:
    """Free the weights of which `peft` keeps a copy that learns: training computes with the copy.

    The model can then not be run without its adapter.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module = LetGo()


def wrap_plain_layers_first(config: PeftConfig) -> None:
    """Let `peft` wrap unquantized layers without asking quantization libraries about them.

    Asking imports `gptqmodel`, which takes seconds, prints a banner and sets environment
    variables of CUDA. Quantized layers are still shown to all of those libraries.
    """
    if isinstance(config, LoraConfig):
        config._register_custom_module({nn.Module: _wrap_plain})


def _wrap_plain(layer: nn.Module, adapter: str, **settings: Any) -> nn.Module | None:
    """The layer with an adapter beside it; None where it is no plain one."""
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    return dispatch_default(layer, adapter, **settings) if type(base) in PLAIN_LAYERS else None


def refuse_impossible(model: PreTrainedModel, adapter: Adapter) -> None:
    """Raise VltrainError for an adapter that the model's kind of weights cannot have."""
    if adapter.dora and is_gptq(model):
        raise VltrainError.at(
            "lora.dora",
            what="DoRA needs the size of each weight, and peft does not read it from GPTQ layers",
            fix="take out lora.dora, or start from the bf16 checkpoint",
        )
    if adapter.pissa and getattr(model, "is_quantized", False):
        raise VltrainError.at(
            "lora.start",
            what="pissa changes the base's weights, and these are quantized",
            fix="leave lora.start at zero",
        )


def learns_to_see(model: nn.Module, family: Family) -> bool:
    """Whether a weight of the vision tower or of the projector takes a gradient."""
    return any(
        parameter.requires_grad and family.parts.of(published_name(name)) != "language"
        for name, parameter in model.named_parameters()
    )


def refuse_idle_patterns(model: PeftModel, adapter: Adapter) -> None:
    """Raise VltrainError for ranks and alphas of layers that have no adapter; `peft` is silent."""
    layers = [
        published_name(name) for name, part in model.named_modules() if isinstance(part, LoraLayer)
    ]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(adapter, key):
            # as peft reads it: the end of a name
            if not any(re.match(rf"(?:.*\.)?(?:{pattern})$", layer) for layer in layers):
                raise VltrainError.at(
                    f"lora.{key}",
                    what=f"{pattern!r} is no layer with an adapter",
                    fix=f"name one of them, such as {layers[0]}, or the end of a name",
                )


def count_parts(model: nn.Module, family: Family) -> dict[CountedPart, PartCount]:
    """Learned and all parameters of each part, low-rank adapters as a part of their own.

    A module that learns whole beside LoRA is a copy: it counts as learned in its part, and not
    twice in the part's size, its original there or not. A weight of 4 or 8 bits counts as one.
    """
    counts: dict[CountedPart, PartCount] = {}
    in_fp8 = fp8_weights(model)
    originals = {
        published_name(name) for name, _ in model.named_parameters() if ORIGINAL_MARK in name
    }
    for name, parameter in model.named_parameters():
        layer, _, own_name = name.rpartition(".")
        if layer in in_fp8 and own_name != "bias":
            continue
        plain = published_name(name)
        part = "adapter" if ADAPTER_MARK in name else family.parts.of(plain)
        before = counts.get(part, PartCount(0, 0))
        size = weight_count(parameter)
        learned = size if parameter.requires_grad else 0
        own = 0 if COPY_MARK in name and plain in originals else size
        counts[part] = PartCount(before.learned + learned, before.total + own)
    for name, size in (gptq_weights(model) | in_fp8).items():
        part = family.parts.of(published_name(name))
        before = counts.get(part, PartCount(0, 0))
        counts[part] = PartCount(before.learned, before.total + size)
    return counts
