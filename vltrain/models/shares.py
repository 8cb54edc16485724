"""Weights of which each process holds a share: DeepSpeed's ZeRO-3 and torch's FSDP2.

Both leave a parameter in its place with less in it. What a caller may not do without asking here
is count its elements, change its dtype, or read it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_zero3(parameter: Tensor) -> bool:
    """Whether DeepSpeed has shared a parameter out; its own data is empty then."""
    return hasattr(parameter, "ds_id")


def element_count(parameter: Tensor) -> int:
    """Elements of a parameter, all shares together."""
    return parameter.ds_numel if is_zero3(parameter) else parameter.numel()


def whole_tensors(
    parameters: Iterable[tuple[str, nn.Parameter]], *, keep: bool
) -> dict[str, Tensor]:
    """Parameters, put together from their shares one after the other.

    Every process has to come here with the same names in the same order.

    Args:
        parameters: by name.
        keep: whether this process wants them; the others only give their shares.

    Returns:
        Tensors on the CPU where they were shared out, else as they are; {} without `keep`. What
        DeepSpeed learns in float32 and computes with in 16 bits is the float32.
    """
    whole = {name: _whole(parameter, keep=keep) for name, parameter in parameters}
    return {name: tensor for name, tensor in whole.items() if tensor is not None}


@torch.no_grad()
def _whole(parameter: nn.Parameter, *, keep: bool) -> Tensor | None:
    master = _float32_master(parameter)
    if master is not None:
        return master.cpu() if keep else None
    if is_zero3(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().cpu().clone() if keep else None
    if isinstance(parameter, DTensor):
        gathered = parameter.detach().full_tensor()
        return gathered.cpu() if keep else None
    return parameter.detach() if keep else None


def _float32_master(parameter: nn.Parameter) -> Tensor | None:
    """What DeepSpeed's optimizer holds of a parameter of 16 bits that learns; None of others."""
    linked = hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")
    if not linked or parameter.dtype == torch.float32:
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)
