"""The loss of next-token prediction: logits of learned tokens only, and no float32 copy of them.

At Qwen-VL's 151,936 ids the logits of 2,048 tokens take 0.6 GiB in bfloat16; a loss that widens
them all holds several times as much.

Dimension letters: `B` batch, `L` tokens, `D` width, `T` learned tokens of it, `V` vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

IGNORE_INDEX = -100  # the default of torch.nn.functional.cross_entropy
ROWS = 256  # of the logits that are widened to float32 at a time


class SummedCrossEntropy(torch.autograd.Function):
    """Cross-entropy summed over rows; in backward the gradient takes the place of the logits."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor) -> Tensor:
        """float [T, V] and int64 [T] -> float32 scalar."""
        norms = torch.empty(logits.size(0), dtype=torch.float32, device=logits.device)
        chosen = torch.empty_like(norms)
        for rows in _row_blocks(logits.size(0)):
            wide = logits[rows].float()
            norms[rows] = wide.logsumexp(-1)
            chosen[rows] = wide.gather(1, targets[rows, None])[:, 0]
        ctx.save_for_backward(logits, targets, norms)
        return (norms - chosen).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        logits, targets, norms = ctx.saved_tensors
        gradient = logits.detach()  # the same memory: a second backward is an error of autograd's
        for rows in _row_blocks(logits.size(0)):
            wide = (logits[rows].float() - norms[rows, None]).exp_()
            wide.scatter_add_(1, targets[rows, None], torch.full_like(norms[rows, None], -1.0))
            gradient[rows] = wide.mul_(scale).to(gradient.dtype)
        return gradient, None


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
