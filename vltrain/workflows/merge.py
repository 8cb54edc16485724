"""Adapters + base -> weights that stand alone, proven equal before they get their name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from vltrain import __version__
from vltrain.errors import VltrainError
from vltrain.models.adapted import find_base, read_origin
from vltrain.models.gptq import is_packed
from vltrain.models.hub import ResolvedModel
from vltrain.models.loading import load_processor
from vltrain.models.manifest import MERGE_REPORT, file_list, write_report
from vltrain.models.merging import MergedWeights, refuse_unfit, saved_adapter
from vltrain.models.plain_weights import plain_weights
from vltrain.models.quantization import Nf4
from vltrain.models.saving import copy_companions, save_shards
from vltrain.models.side_by_side import load_side_by_side
from vltrain.workflows.proof import (
    PACKED_TOLERANCE,
    TOLERANCE,
    Difference,
    compare,
    distance,
    dtype_name,
    logits_tolerance,
    nothing_changed,
    prove_by_tensor,
)
from vltrain.workflows.quiet import hide_weight_bars
from vltrain.workflows.reload import probe_inputs, probe_logits, reload_in_a_fresh_process
from vltrain.workflows.whole_folder import refuse_existing, refuse_small_disk, whole_folder

Into = Literal["auto", "base", "dequantized"]


@dataclass(frozen=True)
class Plan:
    """What is merged into what, found and held against each other."""

    merged: MergedWeights
    base: ResolvedModel
    hashes: tuple[str | None, ...]  # of the base, as each adapter has it
    trained_on: Nf4 | None  # how the base was held while the adapters learned
    quantized: bool  # whether they learned on 4 bits at all
    into: Literal["base", "dequantized"]

    @property
    def folders(self) -> list[Path]:
        """The adapters' folders."""
        return [adapter.folder for adapter in self.merged.adapters]

    @property
    def tolerance(self) -> float:
        """How far logits may be from those of base + adapters, as a share of their size."""
        base = self.merged.base
        layers = base.model.config.get_text_config().num_hidden_layers
        own = logits_tolerance(base.dtype, layers)
        return max(own, PACKED_TOLERANCE) if base.packed.layers else own

    @property
    def beside(self) -> Nf4 | None:
        """How the base is to be held when the adapters stand beside it: as it is merged into."""
        return self.trained_on if self.into == "dequantized" else None


def merge(
    adapter: Path,
    out: Path,
    base: str | None = None,
    console: Console | None = None,
    *,
    others: Sequence[tuple[Path, float]] = (),
    into: Into = "auto",
    low_memory: bool = False,
) -> None:
    """Write base + adapters as a model of its own, in the base's layout, names and dtype.

    The weights are made and written shard by shard. What was written is read by a fresh process
    and must answer like base + adapters on fixed inputs. Only then does the folder get its name:
    a merge that is cut off leaves no `out`. `merge.json` in it says what was merged and how near
    it came.

    Args:
        adapter: the folder of an adapter, such as RUN/final or a checkpoint of a run.
        out: the folder to make.
        base: where the base is now, a folder or a name on the hub; default where it was.
        console: where to report; default the terminal.
        others: more adapters of the same base, and what share of each is added.
        into: of adapters that learned on 4 bits: the weights as their layers computed with them
            ("dequantized", which "auto" is), or the 16-bit base.
        low_memory: prove it tensor by tensor, with a shard in memory and never a model.

    Raises:
        VltrainError: `out` exists or the disk is too small for it, an adapter is not whole or of
            another base, it changes nothing, or the merged weights answer otherwise than base +
            adapters.
    """
    console = console or Console()
    hide_weight_bars()
    refuse_existing(out)
    console.print("comparing the base's weights with those that the adapter was trained on")
    plan = plan_merge([(adapter, 1.0), *others], base, into)
    names = " + ".join(str(folder) for folder in plan.folders)
    console.print(f"merging {names} into {_described(plan)}", soft_wrap=True)
    shapes = plan.merged.shapes()
    refuse_small_disk(out, sum(shape.nbytes for shape in shapes.values()))
    expected = None if low_memory else logits_before(plan)
    with whole_folder(out) as draft:
        dtype = plan.merged.base.dtype
        copy_companions(plan.base.path, dtype, draft)
        save_shards(shapes, plan.merged.read, draft)
        if not plan.merged.changed:
            raise nothing_changed(adapter, dtype)
        report = description(plan) | {"files": file_list(draft)}
        write_report(draft, report, MERGE_REPORT)
        console.print("reading the merged weights back in a fresh process")
        proof = prove(draft, plan, expected)
        write_report(draft, report | {"proof": proof}, MERGE_REPORT)
    tell(console, out, proof, dtype)


def plan_merge(shares: Sequence[tuple[Path, float]], base: str | None, into: Into = "auto") -> Plan:
    """Find the base of some adapters and hold them against it; no weight is read but for its hash.

    Raises:
        VltrainError: an adapter is not whole, or of another base than it or the first one says.
    """
    origins = [read_origin(folder) for folder, _ in shares]
    if len({origin.nf4 for origin in origins}) > 1:
        raise VltrainError.at(
            str(shares[-1][0]),
            what="was trained on weights held in another form than those of the first adapter",
            fix="merge adapters together that were trained by the same method",
        )
    first, nf4 = shares[0][0], origins[0].nf4
    quantized = nf4 is not None or _is_packed_there(origins[0].path)
    other_form = into == "base" and quantized and nf4 is None and base is not None
    source = find_base(first, base, other_form=other_form)
    for folder, _ in shares[1:]:
        find_base(folder, str(source.path), other_form=other_form)
    packed = is_packed(source.path)
    if into == "dequantized" and not packed and nf4 is None:
        raise VltrainError.at(
            str(first),
            what="was not trained on 4 bits, so there is nothing to dequantize",
            fix="leave out --into",
        )
    if into == "base" and packed:
        raise VltrainError.at(
            str(source.path),
            what="is packed to 4 bits: there is no 16-bit base in it",
            fix="name the 16-bit checkpoint with --base, or leave out --into",
        )
    chosen = "base" if into == "base" or not (packed or nf4) else "dequantized"
    adapters = [saved_adapter(folder, weight) for folder, weight in shares]
    weights = plain_weights(source.path, nf4 if chosen == "dequantized" else None)
    refuse_unfit(adapters, weights)
    return Plan(
        MergedWeights(weights, adapters),
        source,
        tuple(origin.hash for origin in origins),
        nf4,
        quantized or packed,
        chosen,
    )


def _is_packed_there(folder: Path) -> bool:
    """Whether the base lies where it was, packed to 4 bits."""
    return (folder / "config.json").is_file() and is_packed(folder)


def _described(plan: Plan) -> str:
    if not plan.quantized:
        return str(plan.base.path)
    if plan.into == "base":
        return f"{plan.base.path}, the 16-bit weights below what they were trained on"
    return f"{plan.base.path}, as its 4 bits have it: the weights that they were trained on"


@dataclass(frozen=True)
class Expected:
    """Logits of fixed inputs, float32 [tokens, vocabulary], before anything is merged."""

    adapted: Tensor  # of base + adapters
    base: Tensor  # of the base alone
    trained: Tensor | None  # of the 4-bit base + adapters, where another one is merged into


def logits_before(plan: Plan) -> Expected:
    """What base and adapters answer side by side; each model is gone when the next one comes."""
    inputs = probe_inputs(load_processor(plan.base.path))
    base, adapted = _logits_beside(plan, plan.beside, inputs)
    trained = None
    if plan.into == "base" and plan.trained_on is not None:
        _, trained = _logits_beside(plan, plan.trained_on, inputs)
    return Expected(adapted, base, trained)


def _logits_beside(
    plan: Plan, quantize: Nf4 | None, inputs: list[dict[str, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Logits of a base without and with its adapters."""
    model = load_side_by_side(plan.merged, plan.base, quantize)
    with model.disable_adapter():
        base = probe_logits(model, inputs)
    return base, probe_logits(model, inputs)


def prove(draft: Path, plan: Plan, expected: Expected | None) -> dict[str, Any]:
    """Read merged weights in a fresh process and hold them against base + adapters.

    Args:
        draft: the folder that they were written to.
        expected: what base and adapters answer; None: every tensor is held against theirs.

    Returns:
        What was found, for `merge.json`.

    Raises:
        VltrainError: they differ by more than rounding explains.
    """
    dtype = plan.merged.base.dtype
    if expected is None:
        reload_in_a_fresh_process(draft, None)
        difference = prove_by_tensor(plan.merged, plain_weights(draft))
        return proof_by("tensors", difference, TOLERANCE[dtype])
    scratch = draft / "logits.partial"  # inside, so that it goes with what a kill leaves
    try:
        found = reload_in_a_fresh_process(draft, scratch)
    finally:
        scratch.unlink(missing_ok=True)
    difference = compare(
        found,
        expected.adapted,
        expected.base,
        dtype=dtype,
        tolerance=plan.tolerance,
        adapter=plan.folders[0],
    )
    proof = proof_by("logits", difference, plan.tolerance)
    if expected.trained is not None:
        proof["from_the_model_in_4_bits"] = distance(found, expected.trained)
    return proof


def description(plan: Plan) -> dict[str, Any]:
    """What was merged into what: the first part of `merge.json`."""
    merged = plan.merged
    return {
        "vltrain": __version__,
        "base": {
            "name": plan.base.name,
            "path": str(plan.base.path.resolve()),
            "revision": plan.base.revision,
        },
        "adapters": [
            {
                "path": str(adapter.folder.resolve()),
                "weight": adapter.weight,
                "files": file_list(adapter.folder),
                "hash_of_its_base": hash_of_base,
            }
            for adapter, hash_of_base in zip(merged.adapters, plan.hashes, strict=True)
        ],
        "trained_on_4_bits": plan.quantized,
        "into": plan.into,
        "dtype": dtype_name(merged.base.dtype),
        "tensors": sum(1 for _ in merged.base.names()),
        "changed": sorted(merged.changed),
    }


def proof_by(
    what: Literal["logits", "tensors"], difference: Difference, tolerance: float
) -> dict[str, Any]:
    """What was found, for `merge.json`; differences are shares of base + adapter's own size."""
    return {
        "by": what,
        "tolerance": tolerance,
        "merged_from_base_and_adapter": difference.merged,
        "base_from_base_and_adapter": difference.base,
    }


def tell(console: Console, out: Path, proof: dict[str, Any], dtype: torch.dtype) -> None:
    """Say how near the merge came, and when rounding weighs as much as what was learned."""
    name = dtype_name(dtype)
    merged, base = proof["merged_from_base_and_adapter"], proof["base_from_base_and_adapter"]
    what = "logits differ" if proof["by"] == "logits" else "layers differ (at most)"
    console.print(
        f"done: {out}, in {name}; its {what} from those of base + adapter by "
        f"{merged:.2%}, the adapter moves them by {base:.2%}",
        soft_wrap=True,
    )
    if "from_the_model_in_4_bits" in proof:
        console.print(
            f"from the 4-bit model that was trained they differ by "
            f"{proof['from_the_model_in_4_bits']:.2%}: what the adapter learned to make up for in "
            "it is not in the 16-bit base",
            soft_wrap=True,
        )
    if merged >= base / 2:
        console.print(
            f"warning: rounding to {name} weighs as much as what the adapter has learned; train "
            "longer or at a higher learning rate, or use the adapter unmerged",
            soft_wrap=True,
        )
