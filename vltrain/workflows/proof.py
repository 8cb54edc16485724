"""Whether merged weights are base + adapters: by their logits, or tensor by tensor."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vltrain.errors import VltrainError
from vltrain.models.merging import MergedWeights
from vltrain.models.plain_weights import PlainWeights

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far the merged weights' answers may lie from those of base + adapter, as a share of their
size (root mean square): sums in another order, and weights rounded once more."""

TOLERATED_LAYERS = 8
"""Up to so many that holds for the logits of a model, see `logits_tolerance`."""

PACKED_TOLERANCE = TOLERANCE[torch.float16]
"""At least, for bases that GPTQ has packed: their layers compute with scales of 16 bits."""

COLUMNS = 8  # inputs that each layer is tried on where the model does not fit into memory


def logits_tolerance(dtype: torch.dtype, layers: int) -> float:
    """How far logits may lie apart behind so many layers, by rounding alone.

    Each layer rounds by itself, so what their roundings add up to grows with the root of their
    number. 32 layers of Qwen-VL's widths with random weights, in bfloat16, came to 0.0515.
    """
    return TOLERANCE[dtype] * max(1.0, (layers / TOLERATED_LAYERS) ** 0.5)


@dataclass(frozen=True)
class Difference:
    """Two distances between logits, as shares of the size of base + adapter's own."""

    merged: float  # of the merged weights from base + adapter
    base: float  # of the base alone: what the adapter has learned


def distance(found: Tensor, expected: Tensor) -> float:
    """The difference of two tensors, as a share of the size of the second (root mean square)."""
    size = expected.float().square().mean().sqrt()
    return ((found.float() - expected.float()).square().mean().sqrt() / size).item()


def compare(
    found: Tensor,
    expected: Tensor,
    unchanged: Tensor,
    *,
    dtype: torch.dtype,
    tolerance: float,
    adapter: Path,
) -> Difference:
    """How near the merged weights come to base + adapter.

    Args:
        found: logits of the merged weights, read back from disk; float32, as the others.
        expected: of base + adapter.
        unchanged: of the base alone.
        dtype: of the weights.
        tolerance: how far they may be apart.
        adapter: its folder, for the error.

    Raises:
        VltrainError: the merge changed nothing, or its logits are not those of base + adapter.
    """
    difference = Difference(merged=distance(found, expected), base=distance(unchanged, expected))
    if torch.equal(found, unchanged):
        raise nothing_changed(adapter, dtype)
    hint = "; --low-memory says which layer it is"
    refuse_distant(difference.merged, "the logits", dtype, tolerance, adapter, hint)
    return difference


def nothing_changed(adapter: Path, dtype: torch.dtype) -> VltrainError:
    """The refusal of a merge that changes nothing."""
    return VltrainError.at(
        str(adapter),
        what=f"merged in {dtype_name(dtype)} it changes nothing: the weights answer exactly as "
        "the base",
        fix="train longer or at a higher learning rate",
    )


def refuse_distant(
    merged: float, of: str, dtype: torch.dtype, tolerance: float, adapter: Path, hint: str = ""
) -> None:
    """Raise VltrainError where a difference is more than rounding to a dtype explains.

    Args:
        hint: what else may mend it.
    """
    if not merged <= tolerance:  # not a number is no pass either
        raise VltrainError.at(
            str(adapter),
            what=f"merged weights differ from base + adapter by {merged:.2%} of {of}, "
            f"{tolerance:.2%} is what rounding to {dtype_name(dtype)} explains; nothing "
            "was kept",
            fix="look for weights that are not finite: the run's loss in metrics.jsonl tells"
            + hint,
        )


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" and the like."""
    return str(dtype).removeprefix("torch.")


def prove_by_tensor(merged: MergedWeights, written: PlainWeights) -> Difference:
    """How near each merged tensor comes to the base's and the adapters', one after the other.

    A layer with adapters is tried on fixed inputs: what the written weight makes of them, against
    base and adapters side by side. All other tensors must be the base's, or the adapter's own.

    Args:
        merged: what was written.
        written: what lies on the disk.

    Returns:
        The largest distance of the merged layers from base + adapter, and of the base's.

    Raises:
        VltrainError: a tensor is not what it should be.
    """
    adapter, dtype, worst, moved = merged.adapters[0].folder, merged.base.dtype, 0.0, 0.0
    for name in merged.base.names():
        layer, _, own = name.rpartition(".")
        adapted = own == "weight" and any(layer in a.layers for a in merged.adapters)
        found = written.read(name)
        if not adapted:
            if not torch.equal(found, merged.read(name)):
                raise VltrainError.at(
                    name,
                    what="is on the disk not what was merged; nothing was kept",
                    fix="check the disk, and run the same command again",
                )
            continue
        plain = merged.base.read(name)
        outputs = list(_outputs(merged, layer, plain, found))
        apart = distance(outputs[0], outputs[1])
        refuse_distant(apart, f"the outputs of {layer}", dtype, TOLERANCE[dtype], adapter)
        worst = max(worst, apart)
        moved = max(moved, distance(outputs[2], outputs[1]))
    return Difference(merged=worst, base=moved)


@torch.no_grad()
def _outputs(merged: MergedWeights, name: str, plain: Tensor, found: Tensor) -> Iterator[Tensor]:
    """What a layer answers to fixed inputs: merged, base + adapters, base alone."""
    layer = merged.layer(name, plain)
    base = layer.get_base_layer()
    generator = torch.Generator().manual_seed(0)
    if isinstance(base, nn.Embedding):
        inputs = torch.randint(len(plain), (COLUMNS,), generator=generator)
    else:
        inputs = torch.randn(COLUMNS, plain.shape[1], generator=generator)
    beside = layer(inputs)
    alone = base(inputs)
    base.weight.data = found.float()
    yield base(inputs)
    yield beside
    yield alone
