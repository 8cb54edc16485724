"""Embeddings and head that learn, with no second matrix of the vocabulary's size on the way back.

Autograd computes such a gradient whole, in the dtype that is computed in, copies it to the
weight's, and adds that to the gradient which is there: at Qwen-VL's 151,936 ids of width 4,096
these are 1.2, 2.3 and 2.3 GiB. Here it is added up where it is to lie: the head's a piece of the
vocabulary at a time, the embeddings' in the rows that a batch has used. Autograd is handed no
gradient, so one that other processes are to be sent is not for this.

Dimension letters: `T` tokens, `D` width, `V` vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vltrain.models.sizes import HEAD_PIECE


class PieceByPiece(torch.autograd.Function):
    """A product with a head's matrix, a piece of which at a time is in the computed dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        """float [T, D] and [V, D] -> [T, V] in the dtype of `hidden`, which is computed in."""
        ctx.save_for_backward(hidden)
        ctx.weight = weight  # itself: what is saved for backward may come back as another tensor
        logits = hidden.new_empty(hidden.size(0), weight.size(0))
        for rows in _pieces(weight):
            torch.mm(hidden, weight[rows].to(hidden.dtype).t(), out=logits[:, rows])
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (hidden,), weight = ctx.saved_tensors, ctx.weight
        total = _gradient_of(weight)
        below = torch.zeros_like(hidden, dtype=torch.float32)
        for rows in _pieces(weight):
            below += gradient[:, rows] @ weight[rows].to(hidden.dtype)
            total[rows] += gradient[:, rows].t() @ hidden
        return below.to(hidden.dtype), None


class UsedRows(torch.autograd.Function):
    """Embeddings of tokens; in backward the rows that they are take their gradients."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        """int64 [...] and float [V, D] -> [..., D]."""
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        """One sum for each id, in a fixed order, so that the same run has the same gradients."""
        (ids,), weight = ctx.saved_tensors, ctx.weight
        ordered, order = ids.flatten().sort(stable=True)
        places = F.pad((ordered[1:] != ordered[:-1]).cumsum(0), (1, 0))  # among the ids in use
        sums = torch.ops.aten.embedding_dense_backward(
            gradient.flatten(0, -2)[order], places, ordered.numel(), -1, False
        )
        # Behind those of the ids in use there are sums of nothing, which id 0 takes.
        used = torch.zeros_like(ordered).scatter_(0, places, ordered)
        _gradient_of(weight).index_add_(0, used, sums.to(weight.dtype))
        return None, None


def _gradient_of(weight: Tensor) -> Tensor:
    """A weight's gradient as it is; of zeros where there is none yet."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def _pieces(weight: Tensor) -> list[slice]:
    return [slice(at, at + HEAD_PIECE) for at in range(0, weight.size(0), HEAD_PIECE)]


class LearnedHead(nn.Linear):
    """A head without bias that adds up its own gradient."""

    def forward(self, input: Tensor) -> Tensor:
        """float [..., D] -> [..., V]."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input)
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        return PieceByPiece.apply(input.flatten(0, -2), self.weight).unflatten(0, input.shape[:-1])


class LearnedEmbedding(nn.Embedding):
    """An embedding that adds up its own gradient."""

    def forward(self, input: Tensor) -> Tensor:
        """int64 [...] -> float [..., D]."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input)
        return UsedRows.apply(input, self.weight)


def add_in_place(model: nn.Module) -> None:
    """Let the embeddings and the head of a model add up their own gradients, where they learn.

    For one process: nothing beyond a weight sees its gradient come.

    Args:
        model: one of `transformers`, wrapped by `peft` or not.
    """
    for module in _ends(model):
        if type(module) is nn.Linear and module.bias is None and module.weight.requires_grad:
            module.__class__ = LearnedHead
        elif type(module) is nn.Embedding and _is_plain(module) and module.weight.requires_grad:
            module.__class__ = LearnedEmbedding


def _ends(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of input and output embeddings; of those that `peft` has copied, the copies."""
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(end, ModulesToSaveWrapper):
            yield from end.modules_to_save.values()
        elif end is not None:
            yield end


def _is_plain(embedding: nn.Embedding) -> bool:
    """Whether it looks rows up, and does nothing else to them or to their gradients."""
    special = (embedding.padding_idx, embedding.max_norm)
    return special == (None, None) and not (embedding.scale_grad_by_freq or embedding.sparse)
