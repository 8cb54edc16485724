"""The sections of a recipe that say what learns, how fast, and in how many bits."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt
from pydantic import ConfigDict

from vltrain.recipe_types import STRICT, Fault, UserPath

Method = Literal["full", "lora", "qlora"]

Ranks = dict[str, Annotated[int, Ge(1)]]
Alphas = dict[str, Annotated[float, Gt(0)]]
Rate = Annotated[float, Gt(0)]


@dataclass(frozen=True)
class LoraConfig:
    """How large the adapters are, where they sit and how they begin."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    r: Annotated[int, Ge(1)] = 64
    alpha: Annotated[float, Gt(0)] = 16
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.05
    targets: tuple[str, ...] | str | None = None  # names, or one pattern; None: the family's
    rank_pattern: Ranks = field(default_factory=dict)  # other ranks, by a layer's name or pattern
    alpha_pattern: Alphas = field(default_factory=dict)
    embeddings: Literal["auto"] | bool = "auto"  # learn them whole; auto: base is not chat-tuned
    dora: bool = False  # learn the size of each weight's columns by itself (arXiv:2402.09353)
    rslora: bool = False  # alpha over the root of r, for large ranks (arXiv:2312.03732)
    plus: Annotated[float, Ge(1)] | None = None  # B learns so many times faster (arXiv:2402.12354)
    weights: Literal["fp32", "bf16"] = "fp32"  # bf16: the optimizer keeps float32 masters of them
    # How frozen layers of the language model are held and multiplied: the recipe's dtype, or fp8.
    base: Literal["dtype", "fp8"] = "dtype"
    start: Literal["zero", "pissa"] = "zero"  # pissa: at the base's main directions (2404.02948)
    continue_from: UserPath | None = None  # an earlier adapter; its shape is taken over


@dataclass(frozen=True)
class FreezeConfig:
    """Which parts of the model stay as they are."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    vision: bool = True
    projector: bool | None = None  # None: frozen under lora; full learns what the family says
    language: bool = False


@dataclass(frozen=True)
class QuantizeConfig:
    """What is held in 4 bits under the adapters, beside the language model's layers."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    vision: bool = False  # the linear layers of the vision tower


@dataclass(frozen=True)
class FullConfig:
    """How weights that learn in full are held."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    # fp32: 16 bytes for each, gradient and optimizer included. residual: bf16 and the 16 bits that
    # rounding takes, 8 bytes. stochastic: bf16 rounded at random, 6. auto: the first that fits.
    weights: Literal["auto", "fp32", "residual", "stochastic"] = "auto"


@dataclass(frozen=True)
class LearningRates:
    """Learning rates of single parts, in the place of trainer.learning_rate."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    vision: Rate | None = None
    projector: Rate | None = None
    language: Rate | None = None


METHOD_SECTIONS: dict[Method, tuple[str, ...]] = {
    "full": ("full",),
    "lora": ("lora",),
    "qlora": ("lora", "quantize"),
}
"""Sections that belong to single methods; `freeze` and `lr` are everybody's."""

FOREIGN_SECTIONS = {
    "lora": ("has no adapter", "run vltrain lora"),
    "quantize": ("quantizes nothing", "run vltrain qlora"),
    "full": ("does not learn the model's own weights", "run vltrain full"),
}
"""Why a method has no such section, and where it belongs."""


def foreign_sections(method: Method) -> tuple[str, ...]:
    """The sections that a recipe of this method has no use for."""
    return tuple(name for name in FOREIGN_SECTIONS if name not in METHOD_SECTIONS[method])


def method_faults(
    method: Method,
    dtype: str,
    lora: LoraConfig,
    freeze: FreezeConfig,
    quantize: QuantizeConfig,
    full: FullConfig,
    lr: LearningRates,
    trainer: dict[str, Any],
) -> Iterator[Fault]:
    """Combinations that cannot work, whatever the model and the machine."""
    if method == "full":
        yield from _full_faults(dtype, freeze, full, trainer)
    else:
        yield from _adapter_faults(freeze, lora)
    if method != "full" and lora.weights == "bf16":
        yield from _bf16_faults(method, dtype, trainer)
    if method != "full" and lora.base == "fp8":
        yield from _fp8_faults(method, dtype, lora)
    if method == "qlora":
        yield from _quantization_faults(lora, freeze, quantize)
    for part in fields(lr):
        frozen = getattr(freeze, part.name)
        if part.name == "projector" and frozen is None:
            frozen = method != "full"
        if getattr(lr, part.name) is not None and frozen:
            yield (
                f"lr.{part.name}",
                f"the {part.name} is frozen, and a learning rate is given for it",
                f"take it out, or set freeze.{part.name}: false",
            )


def _full_faults(
    dtype: str, freeze: FreezeConfig, full: FullConfig, trainer: dict[str, Any]
) -> Iterator[Fault]:
    if freeze.vision and freeze.projector and freeze.language:
        yield "freeze", "all parts are frozen: nothing would learn", "unfreeze one of them"
    if full.weights not in ("residual", "stochastic"):
        return
    if dtype not in ("auto", "bf16"):
        yield (
            "full.weights",
            f"{full.weights} weights are bf16, and dtype is {dtype}",
            "take out dtype, or set full.weights: fp32",
        )
    if "optim" in trainer:
        yield (
            "trainer.optim",
            f"{full.weights} weights have an optimizer of their own, an 8-bit AdamW",
            "take out trainer.optim, or set full.weights: fp32",
        )


def _adapter_faults(freeze: FreezeConfig, lora: LoraConfig) -> Iterator[Fault]:
    if freeze.language:
        yield (
            "freeze.language",
            "LoRA adapts the language model, which this freezes",
            "leave freeze.language false, or run `vltrain full` with it",
        )
    if lora.start != "pissa":
        return
    for key, given, why in (
        ("dora", lora.dora, "DoRA is defined against the base's own weights, which PiSSA changes"),
        ("rslora", lora.rslora, "the adapter is saved at twice the rank, which changes its scale"),
        ("rank_pattern", lora.rank_pattern, "the adapter is saved at twice one rank"),
        ("alpha_pattern", lora.alpha_pattern, "the adapter is saved at twice one rank"),
        ("continue_from", lora.continue_from, "an adapter that is continued has begun already"),
    ):
        if given:
            what = f"`lora.{key}` does not go with lora.start: pissa ({why})"
            yield f"lora.{key}", what, "take out one of the two"


def _bf16_faults(method: Method, dtype: str, trainer: dict[str, Any]) -> Iterator[Fault]:
    """What has no place for weights in bf16 with float32 masters."""
    if method == "qlora":
        what = "the optimizer of qlora has 8 bits, and keeps no float32 of weights in bf16"
        yield "lora.weights", what, "take it out, or run `vltrain lora`"
    if dtype not in ("auto", "bf16"):
        yield (
            "lora.weights",
            f"adapters in bf16 stand beside a base in bf16, and dtype is {dtype}",
            "take out dtype, or set lora.weights: fp32",
        )
    if "optim" in trainer:
        yield (
            "trainer.optim",
            "lora.weights: bf16 has an optimizer of its own, an AdamW with float32 masters",
            "take out trainer.optim, or set lora.weights: fp32",
        )


def _fp8_faults(method: Method, dtype: str, lora: LoraConfig) -> Iterator[Fault]:
    """What has no place beside frozen layers in fp8."""
    if method == "qlora":
        what = "the layers of a qlora run have 4 bits, and not 8"
        yield "lora.base", what, "take it out, or run `vltrain lora`"
    if dtype not in ("auto", "bf16"):
        yield (
            "lora.base",
            f"fp8 stands in the place of bf16, and dtype is {dtype}",
            "take out dtype, or lora.base",
        )
    if lora.dora:
        yield (
            "lora.dora",
            "DoRA measures the base's weights in each step, and those in fp8 are only multiplied",
            "take out lora.dora, or lora.base",
        )


def _quantization_faults(
    lora: LoraConfig, freeze: FreezeConfig, quantize: QuantizeConfig
) -> Iterator[Fault]:
    if lora.start == "pissa":
        yield (
            "lora.start",
            "pissa takes the base's main directions out of its weights, and 4 bits cannot hold "
            "what is left",
            "leave lora.start at zero, or run `vltrain lora`",
        )
    if quantize.vision and not freeze.vision:
        yield (
            "quantize.vision",
            "the vision tower is to learn, and weights of 4 bits cannot",
            "set freeze.vision: true, or quantize.vision: false",
        )
