"""Attention over packed rows: each token sees its own sample only, in any model of transformers.

`PACKED` is one more `attn_implementation`, made of two functions that transformers calls: one
makes the mask, once a forward, the other attends, once a layer. On CUDA in half precision torch's
own variable-length kernel does the work, and no mask is built; everywhere else, and for whatever
is not packed, it is `sdpa` with the mask that transformers makes of the positions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "packed"
CAUSAL = (-1, 0)  # the kernel's window: all that came before, nothing after
KERNEL_GPUS = (8, 0)  # and later: the compute capability that torch's kernel is built for
KERNEL_DTYPES = (torch.bfloat16, torch.float16)


def attend_packed(model: PreTrainedModel) -> None:
    """Let all of a model's attention respect the boundaries of packed rows, in place."""
    model.set_attn_implementation(PACKED)


def packed_mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None,
    allow_is_causal_skip: bool,
    dtype: torch.dtype,
    device: torch.device,
    **rest: Any,
) -> Tensor | None:
    """The mask of a forward, or the mark that the kernel needs none.

    Args:
        q_length, kv_length: tokens; they differ where a cache is used.
        attention_mask: bool [B, L], False where padded; None for packed rows.
        allow_is_causal_skip: False where transformers found that positions restart.
        dtype: of the embeddings.
        rest: what else transformers tells a function that makes a mask.

    Returns:
        bool [B, 1, L, L], or None for plain causal attention, as `sdpa` takes them; an empty
        tensor for packed rows where the kernel is used.
    """
    causal_alone = rest.get("local_size") is None and not rest.get("use_vmap")
    packed = (
        causal_alone
        and attention_mask is None
        and not allow_is_causal_skip
        and "allow_is_bidirectional_skip" not in rest  # only masks that look both ways have it
        and q_length == kv_length
    )
    if packed and kernel_serves(device, dtype):
        return torch.empty(0, dtype=torch.bool, device=device)
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        dtype=dtype,
        device=device,
        **rest,
    )


def boundary_mask(
    config: PreTrainedConfig,
    embeddings: Tensor,
    attention_mask: Tensor | None,
    boundaries: Tensor | None,
) -> Tensor | None:
    """The mark that the kernel needs no mask, where a batch says itself that it is packed.

    transformers looks for boundaries in the positions, for which the host waits until a GPU has
    done all that it was asked before.

    Args:
        config: of the model.
        embeddings: float [1, L, D].
        attention_mask: None for packed rows.
        boundaries: int32 [samples + 1], `cu_seq_lens_q` of the batch; None where it has none.

    Returns:
        An empty tensor; None where a mask is to be made as for any batch.
    """
    if config._attn_implementation != PACKED or attention_mask is not None or boundaries is None:
        return None
    if not kernel_serves(embeddings.device, embeddings.dtype):
        return None
    return torch.empty(0, dtype=torch.bool, device=embeddings.device)


def kernel_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention over embeddings of this kind can run in the variable-length kernel."""
    if torch.device(device).type != "cuda":
        return False
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < KERNEL_GPUS:
        return False
    computed_in = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else dtype
    return computed_in in KERNEL_DTYPES


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attend within each sample.

    Args:
        query: float [B, H, L, head_dim].
        key, value: float [B, H or fewer, L, head_dim].
        attention_mask: what `packed_mask` made.
        cu_seq_lens_q: int32 [samples + 1], where each sample begins, and B x L.
        max_length_q: tokens of the longest sample.
        rest: what else transformers tells an attention function.

    Returns:
        float [B, L, H, head_dim], and None for the weights.

    Raises:
        ValueError: positions restart, but the batch does not say where samples begin.
    """
    if attention_mask is None or attention_mask.numel():
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **rest
        )
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("packed rows need cu_seq_lens_q and max_length_q beside their positions")
    groups = query.size(1) // key.size(1)
    return _varlen(
        query,
        repeat_kv(key, groups),
        repeat_kv(value, groups),
        cu_seq_lens_q,
        max_length_q,
        scaling,
    ), None


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    scaling: float | None,
) -> Tensor:
    """torch's kernel over float [B, H, L, head_dim] each; float [B, L, H, head_dim].

    Of its arguments only those that torch 2.11 has are used.
    """
    from torch.nn.attention.varlen import varlen_attn

    rows = query.size(0)
    # Values are a view of all three as they were projected, and would keep them for the way back.
    flat = [
        part.transpose(1, 2).flatten(0, 1).contiguous() for part in (query, key, value)
    ]  # [B L, H, d]
    attended = varlen_attn(
        *flat, boundaries, boundaries, longest, longest, scale=scaling, window_size=CAUSAL
    )
    return attended.unflatten(0, (rows, -1))


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)
