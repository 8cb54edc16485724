"""The loss of next-token prediction: logits of learned tokens only, and no float32 copy of them.

At Qwen-VL's 151,936 ids the logits of 2,048 tokens take 0.6 GiB in bfloat16; a loss that widens
them all holds several times as much.

Dimension letters: `B` batch, `L` tokens, `D` width, `T` learned tokens of it, `V` vocabulary.
"""

import logging
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

IGNORE_INDEX = -100  # the default of torch.nn.functional.cross_entropy
ROWS = 256  # of the logits that are widened to float32 at a time, where kernels do not serve
KERNEL_GPUS = (8, 0)  # and later: the compute capability
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

logger = logging.getLogger(__name__)


class SummedCrossEntropy(torch.autograd.Function):
    """Cross-entropy summed over rows; in backward the gradient takes the place of the logits."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor) -> Tensor:
        """float [T, V] and int64 [T] -> float32 scalar."""
        kernels = kernels_for(logits)
        compute = _row_losses if kernels is None else kernels.row_losses
        norms, losses = compute(logits, targets)
        ctx.save_for_backward(logits, targets, norms)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        logits, targets, norms = ctx.saved_tensors
        gradient = logits.detach()  # the same memory: a second backward is an error of autograd's
        kernels = kernels_for(gradient)
        put = _put_gradient if kernels is None else kernels.put_gradient
        put(gradient, targets, norms, scale)
        return gradient, None


def gpus_have_kernels() -> bool:
    """Whether the loss is taken to run in kernels on a GPU: this machine's, or any where it has
    none. Nothing is compiled to find out, so where a C compiler is lacking it may yet not."""
    return not torch.cuda.is_available() or _could_have_kernels(torch.device("cuda"))


def _could_have_kernels(device: torch.device) -> bool:
    new_enough = torch.cuda.get_device_capability(device) >= KERNEL_GPUS
    return new_enough and find_spec("triton") is not None


def kernels_for(logits: Tensor) -> ModuleType | None:
    """`loss_kernels` where it serves these logits; None where torch's own operations have to.

    What is being compiled is left to the compiler, which fuses torch's own.
    """
    serves = (
        not torch.compiler.is_compiling()
        and logits.is_cuda
        and type(logits) is Tensor  # a fake one has no memory
        and logits.dtype in KERNEL_DTYPES
        and logits.stride(1) == 1
        and logits.stride(0) >= logits.size(1)  # or rows would share memory
    )
    return _working_kernels(logits.device, logits.dtype) if serves else None


@cache
def _working_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """`loss_kernels`, once it has computed something on this GPU; None where it cannot."""
    if not _could_have_kernels(device):
        return None
    logits = torch.zeros(1, 8, dtype=dtype, device=device)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        from vltrain.models import loss_kernels

        norms, losses = loss_kernels.row_losses(logits, target)
        loss_kernels.put_gradient(logits, target, norms, losses.sum())
    except torch.OutOfMemoryError:
        raise
    except Exception as why:  # no C compiler, no headers of Python, an unknown driver
        logger.warning("the loss takes longer, for triton does not work here: %s", why)
        return None
    return loss_kernels


def _row_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What `loss_kernels.row_losses` computes, on any device."""
    norms = torch.empty(logits.size(0), dtype=torch.float32, device=logits.device)
    chosen = torch.empty_like(norms)
    for rows in _row_blocks(logits.size(0)):
        wide = logits[rows].float()
        norms[rows] = wide.logsumexp(-1)
        chosen[rows] = wide.gather(1, targets[rows, None])[:, 0]
    return norms, norms - chosen


def _put_gradient(logits: Tensor, targets: Tensor, norms: Tensor, scale: Tensor) -> None:
    """What `loss_kernels.put_gradient` does, on any device."""
    for rows in _row_blocks(logits.size(0)):
        wide = (logits[rows].float() - norms[rows, None]).exp_()
        wide.scatter_add_(1, targets[rows, None], torch.full_like(norms[rows, None], -1.0))
        logits[rows] = wide.mul_(scale).to(logits.dtype)


def _row_blocks(count: int) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, count, ROWS)]


def learned_places(labels: Tensor) -> Tensor:
    """Where in B x L a token stands whose next one is learned.

    Args:
        labels: int64 [B, L], unshifted, -100 where nothing is learned.

    Returns:
        int64 [T], ascending.
    """
    next_one = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    return (next_one != IGNORE_INDEX).flatten().nonzero()[:, 0]


def learned_loss(
    hidden_states: Tensor,
    head: nn.Module,
    labels: Tensor,
    num_items: Tensor | int | None,
    places: Tensor | None = None,
) -> Tensor:
    """The loss over learned tokens. The head is called once, whatever the batch holds.

    Args:
        hidden_states: float [B, L, D], the last layer's.
        head: float [T, D] -> float [T, V]. It runs under ZeRO-3 as any module does.
        labels: int64 [B, L], unshifted, -100 where nothing is learned.
        num_items: learned tokens of the whole accumulated batch, to divide the sum by; None:
            those of this batch.
        places: int64 [T], where in B x L a token stands whose next one is learned, ascending.
            None: they are looked for in `labels`, for which the host waits until a GPU has
            done all that it was asked before.

    Returns:
        float32 scalar; not a number where nothing is learned and `num_items` is None.
    """
    if places is None:
        places = learned_places(labels)
    places = places.to(hidden_states.device)
    logits = head(hidden_states.flatten(0, 1).index_select(0, places))
    targets = labels.to(logits.device).flatten().index_select(0, places.to(logits.device) + 1)
    total = SummedCrossEntropy.apply(logits, targets)
    if isinstance(num_items, Tensor):
        num_items = num_items.to(total.device)
    return total / (targets.numel() if num_items is None else num_items)
