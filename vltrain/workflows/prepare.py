"""Base and recipe -> a model with gradients on what is to learn, and what cannot be refused."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from vltrain.config import Recipe
from vltrain.errors import VltrainError
from vltrain.models.adapted import continue_adapter, refuse_other_shape, saved_shape
from vltrain.models.adapters import Adapter, add_lora, lora_config, set_learned, widen_learned
from vltrain.models.attention import attend_packed
from vltrain.models.catalog import is_chat_tuned
from vltrain.models.family import Family
from vltrain.models.fp8_weights import hold_in_fp8
from vltrain.models.gptq import is_packed
from vltrain.models.layer_runs import LayerRuns
from vltrain.models.loading import load_model
from vltrain.models.quantization import Nf4
from vltrain.models.shares import element_count
from vltrain.training.arguments import run_dtype
from vltrain.training.deepspeed_file import refuse_file_against_recipe
from vltrain.training.engines import Engine
from vltrain.training.full_weights import HELD, HeldWeights, held_weights
from vltrain.training.master_adamw import narrow_learned


def refuse_unfit_base(recipe: Recipe, folder: Path) -> None:
    """Raise VltrainError where the base is quantized in a way that the recipe has no use for."""
    if not is_packed(folder):
        return
    if recipe.method != "qlora":
        raise VltrainError.at(
            str(folder),
            what=f"is packed to 4 bits, which `vltrain {recipe.method}` does not train",
            fix="run `vltrain qlora`, or start from the bf16 checkpoint",
        )
    for key, given, why in (
        ("quantize.vision", recipe.quantize.vision, "the checkpoint says what is quantized"),
        ("lora.dora", recipe.lora.dora, "peft does not read the size of GPTQ's weights"),
    ):
        if given:
            raise VltrainError.at(
                key,
                what=f"does not go with {folder}, which GPTQ has packed: {why}",
                fix=f"take out {key}, or start from the bf16 checkpoint",
            )


def refuse_unfit_engine(recipe: Recipe, engine: Engine) -> None:
    """Raise VltrainError where processes would share out what they cannot, or a file of
    DeepSpeed's would undo what the recipe asks for."""
    if engine.config is not None:
        refuse_file_against_recipe(recipe, engine.config)
    weights = recipe.full.weights
    if recipe.method == "lora" and recipe.lora.weights == "bf16" and engine.name != "none":
        raise VltrainError.at(
            "lora.weights",
            what=f"adapters in bf16 are for one process, and this run is under {engine}",
            fix="set lora.weights: fp32, or start one process",
        )
    if recipe.lora.base == "fp8" and engine.shards_weights:
        raise VltrainError.at(
            "lora.base",
            what=f"{engine} shares weights out, and those in fp8 are whole in each process",
            fix="set engine: ddp, or deepspeed: zero2; or take out lora.base",
        )
    if recipe.method == "qlora" and engine.shards_weights:
        raise VltrainError.at(
            "engine",
            what=f"{engine} shares weights out, and those of 4 bits cannot be",
            fix="set engine: ddp, or deepspeed: zero2",
        )
    if recipe.method == "full" and weights in HELD and engine.name != "none":
        raise VltrainError.at(
            "full.weights",
            what=f"{weights} weights are for one process, and this run is under {engine}",
            fix="set full.weights: fp32, or start one process",
        )


def layer_runs_of(recipe: Recipe, engine: Engine) -> LayerRuns | None:
    """How a run's layers are run; None: as transformers does by the `trainer:` section.

    With `memory: auto` the memory of a GPU has yet to say which of them are recomputed. Where all
    are, compiled ones keep nothing within; those of 4 bits, whose kernels may part what is
    compiled, are recomputed from outside.

    Args:
        recipe: settled.

    Raises:
        VltrainError: the recipe wants them compiled, and they cannot be.
    """
    if not recipe.arranges_layers:
        return None
    compiled = recipe.compile
    assert compiled != "auto", "settled before"
    if compiled and (fault := compiling_fault(engine)) is not None:
        raise fault
    runs = LayerRuns(compiled=compiled, gathered=engine.shards_weights)
    if isinstance(recipe.memory, float):
        if not compiled:  # nothing can leave out a part of a layer: all of it is
            return replace(runs, recompute_every=1)
        return replace(runs, kept=recipe.memory)
    recomputed = {"fast": False, "lean": True}
    all_of_them = recomputed.get(recipe.memory, recipe.trainer["gradient_checkpointing"])
    if not all_of_them:
        return runs
    if compiled and recipe.method != "qlora":  # faster than recomputing each from outside
        return replace(runs, kept=0.0)
    return replace(runs, recompute_every=1)


def compiling_fault(engine: Engine) -> VltrainError | None:
    """Why layers cannot be compiled, as far as that is known before it is tried."""
    if engine.wraps_linear(compiled=True):
        return VltrainError.at(
            "compile",
            what="the DeepSpeed file's memory_efficient_linear would be compiled for each layer",
            fix="take it out of the file, or set compile: false",
        )
    if not has_compiler():
        return VltrainError.at(
            "compile",
            what="torch.compile needs a C++ compiler, and there is none",
            fix="install g++ or clang, or name one in CXX; or set compile: false",
        )
    return None


def has_compiler() -> bool:
    """Whether there is a compiler for what torch.compile makes: C++ on a CPU, C beside a GPU."""
    names = (os.environ.get("CXX"), os.environ.get("CC"), "g++", "gcc", "clang++", "clang")
    return any(shutil.which(name) for name in names if name)


def nf4_of(recipe: Recipe, folder: Path) -> Nf4 | None:
    """How a run holds its base in NF4; None where it does not, or GPTQ has packed it already."""
    plain = recipe.method != "qlora" or is_packed(folder)
    return None if plain else Nf4(recipe.quantize.vision)


def prepare_model(
    recipe: Recipe, family: Family, folder: Path, *, device: torch.device, seed: int
) -> PreTrainedModel | PeftModel:
    """The base, read, with gradients on what the recipe lets learn.

    Raises:
        VltrainError: the base is not whole, or the recipe asks for what it has not.
    """
    if recipe.lora.continue_from is not None:
        wanted, default = (
            lora_config(family, recipe.freeze, adapter)
            for adapter in (adapter_of(recipe, family, folder), Adapter())
        )
        refuse_other_shape(recipe.lora.continue_from, folder, wanted, default)
    quantize = nf4_of(recipe, folder)
    model = load_model(
        folder,
        dtype=run_dtype(recipe),
        device=device if recipe.method == "qlora" else None,  # others are moved when whole
        quantize=quantize,
    )
    model.config.use_cache = False
    if recipe.data.packs:
        attend_packed(model)
    return hold_base(let_learn(model, recipe, family, folder, seed=seed), recipe, family)


def hold_base(
    model: PreTrainedModel | PeftModel, recipe: Recipe, family: Family
) -> PreTrainedModel | PeftModel:
    """The model, its frozen layers in fp8 where the recipe has them so."""
    if recipe.lora.base == "fp8":
        hold_in_fp8(model, family)
    return model


def let_learn(
    model: PreTrainedModel, recipe: Recipe, family: Family, folder: Path, *, seed: int
) -> PreTrainedModel | PeftModel:
    """The model with gradients on what the recipe lets learn, adapters beside it or not."""
    if recipe.method == "full":
        return set_learned(model, family, recipe.freeze)
    if recipe.lora.continue_from is not None:
        return continue_adapter(model, recipe.lora.continue_from, family, recipe.freeze)
    return add_lora(model, family, recipe.freeze, adapter_of(recipe, family, folder), seed=seed)


def adapter_of(recipe: Recipe, family: Family, folder: Path) -> Adapter:
    """The adapter that a recipe describes, for the base in a folder."""
    lora = recipe.lora
    return Adapter(
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        embeddings=learns_embeddings(recipe, family, folder),
        dora=lora.dora,
        rslora=lora.rslora,
        pissa=lora.start == "pissa",
    )


def learns_embeddings(recipe: Recipe, family: Family, folder: Path) -> bool:
    """Whether input and output embeddings learn beside the adapters.

    `auto` lets them where the base is not chat-tuned, and where an adapter that is continued has
    them; in a quantized run it does not, for in float32, with gradient and moments, they would
    take more memory than the model.
    """
    lora = recipe.lora
    if lora.embeddings != "auto":
        return lora.embeddings
    if lora.continue_from is not None:
        return set(family.embeddings) <= set(saved_shape(lora.continue_from).modules_to_save or ())
    return recipe.method == "lora" and not is_chat_tuned(folder)


def shape_of(recipe: Recipe) -> Recipe:
    """The recipe without what reads weights: for counting, on a model that has none."""
    return replace(recipe, lora=replace(recipe.lora, continue_from=None, start="zero"))


def hold_weights(
    model: PreTrainedModel | PeftModel, recipe: Recipe, gpu_bytes: int | None
) -> HeldWeights | None:
    """Widen the learned weights of a full run to float32, or leave them in bfloat16; those of
    adapters are narrowed where the recipe has them so.

    Args:
        gpu_bytes: of the one GPU; None on a CPU, and where processes share the run.

    Returns:
        How a full run holds them: all but fp32 need `Bf16AdamW`; None where adapters learn.
    """
    if recipe.method != "full":
        if recipe.method == "lora" and recipe.lora.weights == "bf16":
            narrow_learned(model)
        return None
    counts = [(element_count(p), p.requires_grad) for p in model.parameters()]
    held = held_weights(
        recipe.full.weights,
        learned=sum(count for count, learns in counts if learns),
        frozen=sum(count for count, learns in counts if not learns),
        gpu_bytes=gpu_bytes if run_dtype(recipe) == "bf16" else None,
    )
    if held == "fp32":
        widen_learned(model)
    return held


def decisions(recipe: Recipe, family: Family, folder: Path, held: HeldWeights | None) -> list[str]:
    """What a recipe leaves open and a run has decided, in words."""
    lines = []
    if recipe.compile:
        lines.append("layers are compiled: the first steps take a minute more (compile: true)")
    if held in HELD:
        lines.append(f"learned weights: {HELD[held]}; moments of 8 bits (full.weights: {held})")
    if recipe.lora.base == "fp8":
        lines.append(
            "frozen layers of the language model: fp8, multiplied in it on a GPU and emulated on a "
            "CPU (lora.base: fp8)"
        )
    if recipe.method == "qlora":
        vision = "quantized too" if recipe.quantize.vision else "kept as it is"
        nf4 = f"NF4, the vision tower {vision}"
        lines.append(
            f"4-bit layers: {'packed by GPTQ, as published' if is_packed(folder) else nf4}"
        )
        if recipe.lora.embeddings == "auto" and not is_chat_tuned(folder):
            lines.append(
                f"the base is not chat-tuned, and {', '.join(family.embeddings)} stay as they are: "
                "in a quantized run they learn with lora.embeddings: true alone"
            )
    return lines
