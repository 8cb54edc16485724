"""A layer of the Qwen-VL v1 decoder, under the published parameter names.

Dimension letters: `B` batch, `L` tokens, `H` heads, `D` width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vltrain.models.qwen_vl.configuration import QwenVLConfig
from vltrain.models.qwen_vl.positions import rotate


class RMSNorm(nn.Module):
    """Root mean square normalisation, computed in float32 (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """float [..., D] -> float [..., D]."""
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normal.to(x.dtype) * self.weight


def plain_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention spelled out (`attn_implementation="eager"`): to compare kernels with.

    Args:
        query, key, value: float [B, H, L, head_dim].
        attention_mask: float [B, 1, L, L] to add, or None.

    Returns:
        float [B, L, H, head_dim] and the attention weights, float [B, H, L, L].
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DecoderAttention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: QwenVLConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.num_key_value_groups = 1
        inner = config.num_attention_heads * config.head_dim
        self.c_attn = nn.Linear(config.hidden_size, 3 * inner)
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        query_scale: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        """float [B, L, D] -> float [B, L, D]; `kwargs` go to the attention function."""
        mixed = self.c_attn(hidden_states).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = mixed.unbind(2)  # [B, L, H, d]
        # Rotated in the order in which they lie: a compiler would write them in any other.
        tables = [table.transpose(1, 2) for table in rotary]
        query, key = rotate(query, *tables), rotate(key, *tables)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        if query_scale is not None:
            query = query * query_scale.to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, plain_attention
        )
        attended, _ = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.c_proj(attended.flatten(2))


class DecoderMLP(nn.Module):
    """Gated MLP; the gate is `w2`."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        inner = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, inner, bias=False)
        self.w2 = nn.Linear(config.hidden_size, inner, bias=False)
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, L, D] -> float [B, L, D]."""
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class DecoderLayer(GradientCheckpointingLayer):
    """One pre-norm layer of the decoder."""

    def __init__(self, config: QwenVLConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = DecoderAttention(config, layer_idx)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = DecoderMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        query_scale: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """float [B, L, D] -> float [B, L, D]."""
        normal = self.ln_1(hidden_states)
        attended = self.attn(normal, attention_mask, rotary, query_scale, past_key_values, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.ln_2(hidden_states))
