"""A packed layer in GPTQModel's Marlin kernel, to be measured beside the one that vltrain uses."""

import io
from contextlib import redirect_stdout

import torch
from torch import Tensor, nn

_MARLIN_LAYERS: list[nn.Module] = []


@torch.library.custom_op("vltrain::marlin", mutates_args=())
def _marlin(x: Tensor, layer: int, outputs: int) -> Tensor:
    return _MARLIN_LAYERS[layer](x)


@_marlin.register_fake
def _(x: Tensor, layer: int, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


class MarlinLayer(nn.Module):
    """A packed layer in GPTQModel's Marlin kernel, which nvcc compiles when it is first used.

    It is one operator to `torch.compile`, which cannot look into the kernel.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        """Take the weights of one of GPTQModel's `TorchLinear`, to compute in a dtype.

        Raises:
            ModuleNotFoundError, ValueError, NotImplementedError: the kernel cannot be compiled
                here, or does not run on this GPU.
        """
        super().__init__()
        with redirect_stdout(io.StringIO()):
            from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear

        self.out_features: int = layer.out_features
        with torch.device(layer.qweight.device):
            kernel = MarlinLinear(
                bits=layer.bits,
                group_size=layer.group_size,
                desc_act=False,
                sym=True,
                in_features=layer.in_features,
                out_features=layer.out_features,
                bias=layer.bias is not None,
                dtype=dtype,
            )
        for name in ("qweight", "g_idx", "qzeros"):
            getattr(kernel, name).data = getattr(layer, name).clone()
        kernel.scales.data = layer.scales.to(dtype)
        if layer.bias is not None:
            kernel.bias = layer.bias.to(dtype).clone()
        kernel.post_init()
        self._place = len(_MARLIN_LAYERS)
        _MARLIN_LAYERS.append(kernel.eval())

    def forward(self, x: Tensor) -> Tensor:
        """float16 or bfloat16 [..., K] -> [..., N]."""
        return torch.ops.vltrain.marlin(x.contiguous(), self._place, self.out_features)
