"""What spreads a run over its processes: which engine, why, and whether it is the one in use.

none       one process
ddp        every process holds the whole model; gradients are averaged
deepspeed  ZeRO: optimizer states (stage 1), gradients (2) and weights (3) in shares
fsdp2      weights, gradients and states in shares, by torch alone; GPUs only
"""

import copy
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from vltrain.config import EngineChoice
from vltrain.errors import VltrainError
from vltrain.training.deepspeed_file import for_cpu
from vltrain.training.processes import process_count, started_by_torchrun

EngineName = Literal["none", "ddp", "deepspeed", "fsdp2"]


CONFIGS = Path(__file__).parents[1] / "ds_configs"  # the files that a recipe names without a path
USABLE_SHARE = 0.8  # of a GPU's memory; the rest is for activations
GIB = 2**30


@dataclass(frozen=True)
class Engine:
    """An engine with its settings."""

    name: EngineName
    reason: str  # why this one
    config: Mapping[str, Any] | None = None  # of DeepSpeed, as its file has it
    layers: tuple[str, ...] = ()  # of FSDP2: names of the classes that are sharded one by one

    @property
    def zero_stage(self) -> int | None:
        """What DeepSpeed shares out; None for another engine."""
        return None if self.config is None else _stage(self.config)

    @property
    def shards_weights(self) -> bool:
        """Whether every process has to run every module: each holds a share of its weights."""
        return self.name == "fsdp2" or self.zero_stage == 3

    def wraps_linear(self, *, compiled: bool) -> bool:
        """Whether DeepSpeed puts a function of its own in the place of `F.linear`.

        Under ZeRO-3 it does, so that nothing kept for the way back holds on to a weight; but the
        function keeps what every layer reads, and would be compiled anew for each layer. Where
        layers are compiled it is left out, if the file does not ask for it.
        """
        zero = (self.config or {}).get("zero_optimization", {})
        return self.zero_stage == 3 and bool(zero.get("memory_efficient_linear", not compiled))

    @property
    def leaves_model_as_it_is(self) -> bool:
        """Whether parameters, gradients and optimizer are torch's own, whole in each process."""
        return self.name in ("none", "ddp")

    def for_any_number(self) -> "Engine":
        """The same, for reading a checkpoint that other numbers of processes can read as well."""
        config = dict(self.config or {})
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
        return replace(self, config=config)

    @property
    def reads_any_number(self) -> bool:
        """Whether it expects such a checkpoint, see `universal`."""
        return bool((self.config or {}).get("checkpoint", {}).get("load_universal"))

    def __str__(self) -> str:
        return self.name if self.zero_stage is None else f"{self.name} (ZeRO-{self.zero_stage})"


NO_ENGINE = Engine("none", "one process")


@dataclass(frozen=True)
class Machine:
    """What a run is started on."""

    processes: int  # of the run, on all machines
    grouped: bool  # torchrun started them, so that they find each other
    gpu_bytes: int | None  # memory of one GPU; None on a CPU

    @classmethod
    def this(cls) -> "Machine":
        """This machine, in this process of a run."""
        gpu = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
        return cls(process_count(), started_by_torchrun(), gpu or None)


@dataclass(frozen=True)
class Load:
    """Parameters of a run, as far as memory goes."""

    learned: int
    frozen: int
    weight_bytes: int  # of one frozen weight, and of a learned one where it is computed with


def choose_engine(
    choice: EngineChoice,
    deepspeed: str | None,
    machine: Machine,
    load: Callable[[], Load],
    layers: tuple[str, ...],
) -> Engine:
    """The engine of a run.

    Args:
        choice: the recipe's `engine`.
        deepspeed: the recipe's `deepspeed`: a name of `ds_configs/` or a path.
        machine: what the run is started on.
        load: counts the parameters; asked only where the choice depends on them.
        layers: names of the model's layer classes, for FSDP2.

    Raises:
        VltrainError: the engine cannot run here, or DeepSpeed's file cannot be read.
    """
    if choice == "fsdp2":
        _refuse_fsdp2(machine)
        return Engine("fsdp2", "the recipe asks for it", layers=layers)
    if choice == "deepspeed" or deepspeed is not None:
        _refuse_deepspeed(machine)
        if deepspeed is not None:
            config = read_deepspeed(deepspeed)
            config = for_cpu(config) if machine.gpu_bytes is None else config
            return Engine("deepspeed", "the recipe asks for it", config)
        fitting, reason = _smallest_that_fits(machine, load(), allow_ddp=False)
        return Engine("deepspeed", reason, read_deepspeed(fitting))
    if not machine.grouped:
        return NO_ENGINE
    if choice == "ddp":
        return _ddp("the recipe asks for it", machine)
    if machine.gpu_bytes is None:
        return Engine("ddp", "on CPUs the model is held whole")
    fitting, reason = _smallest_that_fits(machine, load(), allow_ddp=True)
    if fitting == "ddp":
        return _ddp(reason, machine)
    if not deepspeed_is_there():
        return Engine("fsdp2", f"{reason}, and DeepSpeed is not installed", layers=layers)
    return Engine("deepspeed", reason, read_deepspeed(fitting))


def _ddp(reason: str, machine: Machine) -> Engine:
    """DDP, but for a single process on a GPU, around whose model accelerate wraps nothing."""
    if machine.processes == 1 and machine.gpu_bytes is not None:
        return NO_ENGINE
    return Engine("ddp", reason)


def _smallest_that_fits(machine: Machine, load: Load, *, allow_ddp: bool) -> tuple[str, str]:
    """The engine that shares out no more than it must: "ddp" or a name of `ds_configs/`; why."""
    needs = bytes_per_gpu(load, machine.processes)
    if not allow_ddp:
        del needs["ddp"]
    room = None if machine.gpu_bytes is None else machine.gpu_bytes * USABLE_SHARE
    fitting = next((name for name in needs if room is None or needs[name] <= room), "zero3_offload")
    first = next(iter(needs))
    size = "" if machine.gpu_bytes is None else f" of a GPU's {machine.gpu_bytes / GIB:,.0f} GiB"
    if fitting == first:
        return fitting, f"it takes about {needs[first] / GIB:,.1f} GiB{size}"
    return fitting, f"{first} would take about {needs[first] / GIB:,.1f} GiB{size}"


def bytes_per_gpu(load: Load, processes: int) -> dict[str, float]:
    """Weights, gradients and AdamW's states on each GPU, by engine, the simplest first.

    A learned weight is held in float32 with a gradient and two states (16 bytes) under DDP;
    DeepSpeed computes with a copy and a gradient in the dtype of the others, and keeps float32
    weight and states (12 bytes) apart.
    """
    width = load.weight_bytes
    frozen, learned = load.frozen * width, load.learned
    return {
        "ddp": frozen + learned * 16,
        "zero2": frozen + learned * width + learned * (width + 12) / processes,
        "zero3": (frozen + learned * (2 * width + 12)) / processes,
    }


def read_deepspeed(name: str) -> dict[str, Any]:
    """DeepSpeed's settings: a file of `ds_configs/` by its bare name, or one of the user's.

    Raises:
        VltrainError: there is no such file, or it holds no JSON object.
    """
    ours = CONFIGS / f"{name}.json"
    path = ours if ours.is_file() else Path(name).expanduser()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.json")))
        raise VltrainError.at(
            "deepspeed",
            what=f"{name!r} is neither a file nor one of {known}",
            fix="give one of these names, or the path of a DeepSpeed JSON",
        ) from None
    except ValueError as error:
        raise VltrainError.at(
            str(path), what=f"not valid JSON ({error})", fix="mend the file"
        ) from error
    if not isinstance(values, dict):
        raise VltrainError.at(str(path), what="holds no JSON object", fix="mend the file")
    return values


def deepspeed_is_there() -> bool:
    """Whether DeepSpeed is installed; it is for Linux alone."""
    return importlib.util.find_spec("deepspeed") is not None


def _refuse_fsdp2(machine: Machine) -> None:
    if machine.gpu_bytes is None:
        raise VltrainError.at(
            "engine",
            what="fsdp2 needs GPUs: on CPUs accelerate would quietly run DDP in its place",
            fix="set engine: ddp, or deepspeed: zero3 to share the weights out",
        )
    _refuse_ungrouped("fsdp2", machine)


def _refuse_deepspeed(machine: Machine) -> None:
    if not deepspeed_is_there():
        raise VltrainError.at(
            "engine", what="DeepSpeed is not installed", fix="pip install deepspeed (Linux only)"
        )
    _refuse_ungrouped("deepspeed", machine)


def _refuse_ungrouped(engine: str, machine: Machine) -> None:
    if not machine.grouped:
        raise VltrainError.at(
            "engine",
            what=f"{engine} needs processes that torchrun has started, even if it is one",
            fix="run `vltrain`, which does it, or torchrun -m vltrain",
        )


def _stage(config: Mapping[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def engine_settings(engine: Engine, *, compiled: bool = False) -> dict[str, Any]:
    """What `TrainingArguments` have to be told for an engine.

    Args:
        compiled: whether the run compiles its layers.
    """
    if engine.name == "ddp":
        # Every module that learns runs in every batch, so nothing has to be searched for.
        return {"ddp_find_unused_parameters": False}
    if engine.name == "deepspeed":
        config = copy.deepcopy(dict(engine.config or {}))
        if engine.zero_stage == 3:
            wraps = engine.wraps_linear(compiled=compiled)
            config["zero_optimization"]["memory_efficient_linear"] = wraps
        return {"deepspeed": config}
    if engine.name == "fsdp2":
        layers = list(engine.layers)
        return {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": layers}}
    return {}


def fsdp2_precision(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Layers compute in `dtype`; gradients are summed, and what passes between stays, in float32.

    accelerate's own policy would round the rotary tables and the loss to `dtype` as well.
    """
    return MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def refuse_other_engine(model: nn.Module, wanted: Engine) -> None:
    """Raise VltrainError unless the wrapped model runs under the engine that was chosen."""
    found = running_engine(model)
    if found != (wanted.name, wanted.zero_stage):
        name, stage = found
        raise VltrainError.at(
            "engine",
            what=f"{wanted} was chosen, and the model runs under {name}"
            + ("" if stage is None else f" (ZeRO-{stage})"),
            fix="unset what tells accelerate or DeepSpeed otherwise; if nothing does, report this",
        )


def running_engine(model: nn.Module) -> tuple[EngineName, int | None]:
    """The engine that a model is really wrapped by, and DeepSpeed's stage, told by classes."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if isinstance(model, DistributedDataParallel):
        return "ddp", None
    if isinstance(model, FSDPModule):
        return "fsdp2", None
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine):
        return "deepspeed", _stage_of_optimizer(model.optimizer)
    return "none", None


def _stage_of_optimizer(optimizer: Any) -> int:
    """The stage whose optimizer DeepSpeed has made."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return 3
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return 2 if optimizer.partition_gradients else 1
    return 0
