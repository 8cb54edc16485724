"""torch's variable-length attention, spelled out for a CPU, where torch has no kernel for it.

With it, a packed row takes the way through a model that it takes on a GPU.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen


def weights_of(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Causal attention weights of one sample: float [H, L, head_dim] each -> float [H, L, L]."""
    scores = query @ key.transpose(1, 2) * scale
    later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1)


def samples(boundaries: Tensor, *parts: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Each sample's place in the row, and its own of float [T, H, head_dim], heads first."""
    for begin, end in pairwise(boundaries.tolist()):
        yield slice(begin, end), [part[begin:end].transpose(0, 1) for part in parts]


def forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale=None, *_: Any):
    """Of the operator, with the log-sums that only its own backward reads left empty."""
    assert is_causal
    out = torch.empty_like(query)
    for place, (q, k, v) in samples(cu_seq_q, query, key, value):
        out[place] = (weights_of(q, k, scale) @ v).transpose(0, 1)
    return out, torch.empty(query.size(1), query.size(0)), torch.empty(2, dtype=torch.uint64)


def backward(
    grad, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, rng, scale, *_
):
    """Gradients of query, key and value (arXiv:2205.14135, appendix B.2)."""
    found = tuple(torch.empty_like(part) for part in (query, key, value))
    for place, (q, k, v, o, g) in samples(cu_seq_q, query, key, value, out, grad):
        weights = weights_of(q, k, scale)
        scores = weights * (g @ v.transpose(1, 2) - (g * o).sum(-1, keepdim=True)) * scale
        own = (scores @ k, scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ g)
        for whole, part in zip(found, own, strict=True):
            whole[place] = part.transpose(0, 1)
    return found


def serve_on_cpu() -> None:
    """Give the operator these two for the CPU, in this process."""
    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)
