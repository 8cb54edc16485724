"""Where a token stands: rotary positions, and what changes past the length of training.

Dimension letters: `B` batch, `L` tokens, `H` heads.
"""

import math

import torch
from torch import Tensor

from vltrain.models.qwen_vl.configuration import QwenVLConfig


def ntk_alpha(lengths: Tensor, seq_length: int) -> Tensor:
    """How far the rotary base is stretched for sequences longer than training saw.

    Args:
        lengths: int64 [B], tokens.
        seq_length: tokens of a training sequence.

    Returns:
        float32 [B]; 1 up to `seq_length`, then 2^k - 1 for the next power of two.
    """
    steps = torch.ceil(torch.log2(lengths.double() / seq_length) + 1)
    return (2**steps - 1).clamp(min=1).float()


def rotary_tables(
    position_ids: Tensor, alpha: Tensor, config: QwenVLConfig
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (arXiv:2104.09864), always float32.

    Computed here and not kept in a buffer: loading a checkpoint leaves buffers that are not in
    it undefined.

    Args:
        position_ids: int64 [B or 1, L].
        alpha: float32 [B or 1], see `ntk_alpha`.

    Returns:
        Two float32 [B or 1, 1, L, head_dim].
    """
    dim = config.head_dim
    base = config.rotary_emb_base * alpha ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, device=position_ids.device).float() / dim
    frequencies = 1.0 / base[:, None] ** exponents  # [B, dim / 2]
    angles = position_ids[:, :, None].float() * frequencies[:, None, :]
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to float [B, H, L, head_dim]; the dtype stays.

    Any order of dimensions will do that the tables have too.
    """
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


def log_n_scale(position_ids: Tensor, seq_length: int) -> Tensor:
    """What a query past `seq_length` is multiplied with: log of its place to that base.

    Args:
        position_ids: int64 [B or 1, L], counted from 0.

    Returns:
        float32 [B or 1, 1, L, 1]; 1 up to `seq_length`.
    """
    place = (position_ids + 1).clamp(min=seq_length).double()
    return (place.log() / math.log(seq_length)).float()[:, None, :, None]
