"""Packed layers in a kernel that is made for answers: it multiplies the 4 bits as they lie.

The layers that a GPTQ checkpoint is loaded into unpack a whole weight to 16 bits for each
multiplication. That gives all gradients, and is slower than a model of 16 bits. The kernel here
gives no gradient: a model that has it answers, and is not trained.

Dimension letters: `N` outputs, `K` inputs, `G` groups of inputs, `M` tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from vltrain.models.gptq import packed_weight, unpacked_codes

INNER_TILES = 8  # of 16 inputs each, how the kernel in torch has its codes interleaved
GROUPS = (32, 64, 128, 256)  # the sizes that it knows
TOLERANCE = 0.02  # of the output's length; bfloat16 rounds sums of thousands of products to less


class Int4Linear(nn.Module):
    """A packed layer in torch's own kernel for 4 bits: bfloat16 on a GPU, any float on a CPU."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        """Take the weights of one of GPTQModel's `TorchLinear`, to compute in a dtype."""
        super().__init__()
        self.in_features: int = layer.in_features
        self.out_features: int = layer.out_features
        self.group_size: int = layer.group_size
        codes = unpacked_codes(layer.qweight.T)  # [N, K]
        zeros = unpacked_codes(layer.qzeros)  # [G, N]
        # the kernel computes (code - 8) * scale + shift
        shift = (8 - zeros) * layer.scales.float()
        pairs = torch.stack([layer.scales.float(), shift], dim=-1)  # [G, N, 2]
        self.register_buffer("codes", _interleaved(codes))
        self.register_buffer("scales_and_shifts", pairs.to(dtype).contiguous())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """float [..., K] -> float [..., N] of the same dtype."""
        rows = x.reshape(-1, self.in_features).to(self.scales_and_shifts.dtype)  # [M, K]
        multiply = torch._weight_int4pack_mm if x.is_cuda else torch._weight_int4pack_mm_for_cpu
        out = multiply(rows, self.codes, self.group_size, self.scales_and_shifts)
        out = out.reshape(*x.shape[:-1], self.out_features).to(x.dtype)
        return out if self.bias is None else out + self.bias.to(x.dtype)


def _interleaved(codes: Tensor) -> Tensor:
    """Codes int32 [N, K] as the kernel wants them, which differs from device to device."""
    if codes.is_cuda:
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)  # [N, K / 2]
        return torch._convert_weight_to_int4pack(pairs, INNER_TILES)
    return torch._convert_weight_to_int4pack_for_cpu(codes, INNER_TILES)


def use_kernel(model: PreTrainedModel) -> int:
    """Put a model's packed layers into a kernel that multiplies 4 bits, in place.

    Each layer is tried on a random input first; one that the kernel does not serve, or that gives
    another output in it, stays as it is.

    Args:
        model: in eval mode, with packed layers as `load_model` makes them, on its device; an
            adapter may be on it.

    Returns:
        How many layers are in the kernel.
    """
    made = 0
    embeddings = model.get_input_embeddings()
    embeddings = getattr(embeddings, "original_module", embeddings)  # a copy that learned is wider
    dtype = embeddings.weight.dtype  # packed layers have float16 in any model
    for name, layer in list(model.named_modules()):
        if "qweight" not in layer._buffers or not _served(layer, dtype):
            continue
        fast = Int4Linear(layer, dtype)
        if not _alike(layer, fast, dtype):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        for own in [key for key, child in parent._modules.items() if child is layer]:
            setattr(parent, own, fast)  # peft has the layer below an adapter under two names
        layer._buffers.clear()  # something that goes in a circle holds it: it would stay for a time
        made += 1
    quantizer = getattr(model, "hf_quantizer", None)
    if made and quantizer is not None:
        quantizer.answers_alone = True
    return made


def _served(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the kernel is made for layers of this shape and device, in a model of this dtype."""
    groups = torch.arange(layer.in_features, device=layer.g_idx.device) // layer.group_size
    if layer.bits != 4 or layer.group_size not in GROUPS or not (layer.g_idx == groups).all():
        return False
    return not layer.qweight.is_cuda or (
        dtype == torch.bfloat16
        and layer.in_features % (16 * INNER_TILES) == 0
        and layer.out_features % 8 == 0
        and torch.cuda.get_device_capability(layer.qweight.device) >= (8, 0)
    )


@torch.no_grad()
def _alike(layer: nn.Module, fast: nn.Module, dtype: torch.dtype) -> bool:
    """Whether two forms of a layer give the same output for a random input."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, layer.in_features, generator=generator)
    x = x.to(layer.qweight.device, dtype)
    weight = packed_weight(layer).to(x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    wanted = F.linear(x, weight, bias).float()
    return bool((fast(x).float() - wanted).norm() <= TOLERANCE * wanted.norm())
