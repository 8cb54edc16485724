"""How processes share a model out, as far as the memory of each goes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vltrain.training.engines import Engine, EngineName


@dataclass(frozen=True)
class Sharing:
    """How processes share a model out."""

    engine: EngineName = "none"
    zero_stage: int = 0  # of DeepSpeed
    processes: int = 1
    offload_optimizer: bool = False  # to host memory
    offload_weights: bool = False
    bucket: int = 0  # numbers that DeepSpeed gathers before it reduces them
    ahead: int = 0  # numbers of weights that ZeRO-3 gathers ahead of what it needs
    most_ahead: int = 0  # that it holds gathered when it goes ahead
    sums_late: bool = False  # FSDP2 has whole gradients up to the last batch of a step

    def share(self, stage: int) -> int:
        """By how much that is divided which ZeRO shares out from `stage` on (arXiv:1910.02054)."""
        shared = self.engine == "fsdp2" or (self.engine == "deepspeed" and self.zero_stage >= stage)
        return self.processes if shared else 1


def sharing_of(engine: Engine, processes: int) -> Sharing:
    """How an engine shares a model out, by DeepSpeed's defaults where its settings say nothing;
    "auto" in them counts as nothing."""
    zero = (engine.config or {}).get("zero_optimization", {})
    stage = engine.zero_stage or 0
    return Sharing(
        engine.name,
        zero_stage=stage,
        processes=processes,
        offload_optimizer=_offloads(zero, "offload_optimizer"),
        offload_weights=_offloads(zero, "offload_param"),
        bucket=_numbers(zero, "reduce_bucket_size", 5 * 10**8) if stage else 0,
        ahead=_numbers(zero, "stage3_prefetch_bucket_size", 5 * 10**7) if stage == 3 else 0,
        most_ahead=_numbers(zero, "stage3_max_live_parameters", 10**9) if stage == 3 else 0,
    )


def _numbers(zero: Mapping[str, Any], key: str, default: int) -> int:
    said = zero.get(key, default)
    return int(said) if isinstance(said, int | float) else 0


def _offloads(zero: Mapping[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"
