"""Which parameters learn: full or LoRA. The only place where the methods differ."""

from dataclasses import dataclass
from typing import Any, Literal

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import dispatch_default
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, set_seed

from vltrain.config import FreezeConfig
from vltrain.errors import VltrainError
from vltrain.models.family import Family, Part, has_prefix
from vltrain.models.shares import element_count, is_zero3

PEFT_PREFIX = "base_model.model."
ADAPTER_MARK = ".lora_"
COPY_MARK = ".modules_to_save."
PLAIN_LAYERS = (nn.Linear, nn.Embedding)  # exactly these: quantized ones are subclasses

CountedPart = Part | Literal["adapter"]


@dataclass(frozen=True)
class Adapter:
    """The shape of a LoRA adapter (arXiv:2106.09685)."""

    r: int = 64
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] | str | None = None  # None: what the family names
    embeddings: bool = False  # input and output embeddings learn in full


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part of a model."""

    learned: int
    total: int


def set_learned(model: PreTrainedModel, family: Family, freeze: FreezeConfig) -> PreTrainedModel:
    """Full-parameter training: gradients on what is not frozen, in place.

    Raises:
        VltrainError: nothing is left to learn.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_learns(name, family, freeze))
    widen_learned(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise VltrainError.at(
            "freeze", what="every part is frozen, nothing learns", fix="set one of them to false"
        )
    return model


def widen_learned(model: nn.Module) -> None:
    """Hold what learns in float32, whatever the checkpoint's dtype.

    At a learning rate of 1e-5 most updates of a bfloat16 weight are lost in rounding. What
    DeepSpeed has shared out is left alone: its optimizer keeps a float32 weight of its own.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and not is_zero3(parameter):
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
        VltrainError: a combination that cannot work, or targets that the model lacks.
    """
    refuse_impossible(freeze)
    beside = list(family.default_projector) if freeze.projector is False else []
    if adapter.embeddings:
        beside += family.embeddings
    targets = family.lora_targets if adapter.targets is None else adapter.targets
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=beside or None,
        bias="none",
        task_type="CAUSAL_LM",
    )
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
    widen_learned(wrapped)
    return wrapped


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


def refuse_impossible(freeze: FreezeConfig) -> None:
    """Raise VltrainError for parts that LoRA can neither train nor do without."""
    if freeze.language:
        raise VltrainError.at(
            "freeze.language",
            what="LoRA adapts the language model, which this freezes",
            fix="leave freeze.language false, or run `vltrain full` with it",
        )
    if not freeze.vision:
        raise VltrainError.at(
            "freeze.vision",
            what="LoRA does not train the vision tower",
            fix="leave freeze.vision true, or run `vltrain full` with freeze.vision=false",
        )


def learns_to_see(model: nn.Module, family: Family) -> bool:
    """Whether a weight of the vision tower or of the projector takes a gradient."""
    return any(
        parameter.requires_grad and family.parts.of(name.removeprefix(PEFT_PREFIX)) != "language"
        for name, parameter in model.named_parameters()
    )


def count_parts(model: nn.Module, family: Family) -> dict[CountedPart, PartCount]:
    """Learned and all parameters of each part, low-rank adapters as a part of their own.

    A module that learns whole beside LoRA is a copy: it counts as learned in its part, and not
    twice in the part's size.
    """
    counts: dict[CountedPart, PartCount] = {}
    for name, parameter in model.named_parameters():
        plain = name.removeprefix(PEFT_PREFIX)
        part = "adapter" if ADAPTER_MARK in plain else family.parts.of(plain)
        before = counts.get(part, PartCount(0, 0))
        learned = element_count(parameter) if parameter.requires_grad else 0
        size = 0 if COPY_MARK in plain else element_count(parameter)
        counts[part] = PartCount(before.learned + learned, before.total + size)
    return counts
