"""The passes of the loss over logits in a GPU's memory, each one kernel of Triton.

The kernels do little arithmetic, so what they take is the time of their reads and writes: losses
read the logits once, gradients read and write them once. All is computed in float32. A kernel is
compiled for a dtype and for whether rows begin at multiples of 16 logits, not for a number of rows.

Dimension letters: `T` rows, `V` vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits that a program has at a time
WARPS = 8  # a thread has 16 logits of a block: two accesses of 16 bytes where they are of 16 bits
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
HIGHEST = tl.constexpr(torch.finfo(torch.float32).max)


def row_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of each row's sum of exponentials, and the cross-entropy of its target.

    Args:
        logits: bf16, fp16 or fp32 [T, V] on a GPU, each row's in one piece.
        targets: int64 [T]; where one is no column of the logits, its loss is not a number.

    Returns:
        Two of float32 [T].
    """
    norms = torch.empty(logits.size(0), dtype=torch.float32, device=logits.device)
    losses = torch.empty_like(norms)
    _launch(_row_losses, len(norms), logits, targets, norms, losses)
    return norms, losses


def put_gradient(logits: Tensor, targets: Tensor, norms: Tensor, scale: Tensor) -> None:
    """Let the gradient of `scale` times the summed losses take the place of the logits.

    Args:
        logits, targets: those of `row_losses`. No two rows share memory.
        norms: the first that it returned.
        scale: float32 scalar on the same GPU; the host does not look at it.
    """
    blocks = triton.cdiv(logits.size(1), BLOCK)
    _launch(_put_gradient, len(norms) * blocks, logits, targets, norms, scale)
    torch.autograd.graph.increment_version(logits)  # torch does not see a kernel write


def _launch(kernel: Any, programs: int, logits: Tensor, targets: Tensor, *others: Tensor) -> None:
    """Run a kernel of `triton.jit` over the logits; of no program there is nothing to run."""
    if programs:
        with torch.cuda.device_of(logits):
            kernel[(programs,)](
                logits,
                targets.contiguous(),
                *others,
                logits.size(1),
                logits.stride(0),
                size=BLOCK,
                num_warps=WARPS,
            )


@triton.jit
def _row_losses(logits, targets, norms, losses, vocabulary, stride, size: tl.constexpr):
    """A program a row: the sum so far is of exponentials less the highest logit so far.

    What is subtracted stays finite, or an infinite logit less itself would not be a number.
    """
    row = tl.program_id(0).to(tl.int64)  # times the stride it may be more than an int32 holds
    logits += row * stride
    highest = tl.full((), LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, vocabulary, size):
        columns = start + tl.arange(0, size)
        block = tl.load(logits + columns, mask=columns < vocabulary, other=float("-inf"))
        block = block.to(tl.float32)
        higher = tl.minimum(tl.maximum(highest, tl.max(block, 0)), HIGHEST)
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(block - higher), 0)
        highest = higher
    norm = highest + tl.log(total)
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocabulary)
    chosen = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(norms + row, norm)
    tl.store(losses + row, norm - chosen)


@triton.jit
def _put_gradient(logits, targets, norms, scale, vocabulary, stride, size: tl.constexpr):
    """A program a block of a row."""
    blocks = tl.cdiv(vocabulary, size)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * size + tl.arange(0, size)
    inside = columns < vocabulary
    logits += row * stride
    block = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)
    probability = tl.exp(block - tl.load(norms + row))
    gradient = tl.where(columns == tl.load(targets + row), probability - 1.0, probability)
    gradient *= tl.load(scale)
    tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=inside)
