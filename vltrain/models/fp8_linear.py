"""A frozen linear layer in fp8: its weight and what it is multiplied with have 8 bits each.

A weight is held as e4m3 codes with one scale for each output, and its codes once more transposed,
as tensor cores want them on the way back: together the bytes of bfloat16. What comes in, and the
gradient, are rounded to e4m3 token by token as they come. e4m3 has 3 bits of mantissa, e5m2 has 2
and a wider range; with a scale for each token the range of e4m3, 2^15 and more, is as much as one
token's numbers need, so the gradient gets the finer of the two as well.

All scales are powers of two. Scaling then rounds nothing, bfloat16 holds each scale as it is, and
the output's scales may go into the gradient before it is rounded: both ways go through the very
same weight.

Dimension letters: `M` tokens, `K` inputs, `N` outputs.
"""

from typing import Any

import torch
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
MULTIPLE = 16  # of a layer's widths, as `torch._scaled_mm` has it
KERNEL_SINCE = (8, 9)  # compute capability of the first GPUs that multiply fp8


class Fp8Linear(nn.Module):
    """A linear layer with a frozen weight in fp8; the gradient of its input flows.

    Codes are held as bytes, which nothing takes for numbers that casts a model or sends it to
    other processes.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        """Round a weight, float [N, K], on its device; the bias, float [N], stays as it is."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        codes, scales = rounded_rows(weight.detach())
        codes = codes.view(torch.uint8)
        self.codes = _frozen(codes)  # uint8 [N, K]
        self.turned = _frozen(codes.t().contiguous())  # uint8 [K, N]
        self.scales = _frozen(scales.t().contiguous())  # float32 [1, N]
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """What the codes stand for: float [N, K], of the dtype that the weight had."""
        return self.codes.view(E4M3).to(self.dtype) * self.scales.t().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """float [..., K] -> float [..., N], in autocast's dtype where that is on."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        codes, turned = self.codes.view(E4M3), self.turned.view(E4M3)
        out = _Product.apply(x, codes, turned, self.scales.float(), dtype)
        return out if self.bias is None else out + self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Sizes, as `nn.Linear` tells its own."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"


def _frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter: DDP would send a buffer to all processes in each step."""
    return nn.Parameter(tensor, requires_grad=False)


class _Product(torch.autograd.Function):
    """x @ weight.t() with both in fp8, and the gradient of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, turned: Tensor, scales: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """float [..., K], e4m3 [N, K] and [K, N], float32 [1, N] -> [..., N] of the dtype."""
        ctx.save_for_backward(turned, scales)
        ctx.dtype, ctx.input_dtype = dtype, x.dtype
        rows, row_scales = rounded_rows(x.reshape(-1, x.size(-1)))
        # Fast accumulation keeps fewer bits of a sum than float32, yet more than e4m3 has left.
        out = multiplied(rows, row_scales, codes, scales, dtype, fast=True)
        return out.view(*x.shape[:-1], codes.size(0))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """float [..., N] -> [..., K], and nothing for all that is frozen."""
        turned, scales = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.size(-1)) * scales.to(gradient.dtype)
        rows, row_scales = rounded_rows(rows)
        ones = scales.new_ones(1, turned.size(0))
        # A gradient goes through all layers below, and what each one lost of sums would add up.
        out = multiplied(rows, row_scales, turned, ones, ctx.dtype, fast=False)
        out = out.view(*gradient.shape[:-1], turned.size(0)).to(ctx.input_dtype)
        return out, None, None, None, None


def rounded_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers in e4m3, each row under the least power of two that its largest number fits with.

    Args:
        rows: bfloat16 or float32 [M, K]. One with an infinite number or NaN comes out with NaN.

    Returns:
        e4m3 [M, K], contiguous; scales, float32 [M, 1].
    """
    # Literals: of global numbers torch.compile would make inputs. 448 is the largest of e4m3, and
    # the least scale is well above where float32 loses bits.
    largest = torch.linalg.vector_norm(rows, float("inf"), -1, keepdim=True)
    exponents = (largest.float().clamp(min=2.0**-110) / 448.0).log2().ceil()
    codes = (rows * (-exponents).exp2().to(rows.dtype)).to(E4M3)  # exact, but for the last step
    return codes.contiguous(), exponents.exp2()


def multiplied(
    rows: Tensor,
    row_scales: Tensor,
    columns: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    *,
    fast: bool,
) -> Tensor:
    """rows @ columns.t() with their scales: in a GPU's fp8 kernel, elsewhere emulated.

    The emulation multiplies what the codes stand for. They are exact in every dtype that a model
    computes in, and so are scales; sums are rounded as the dtype's own products are.

    Args:
        rows: e4m3 [M, K]; row_scales: float32 [M, 1].
        columns: e4m3 [N, K]; scales: float32 [1, N].
        dtype: of what comes out, bfloat16 or float32.
        fast: whether the kernel may keep fewer bits of sums.

    Returns:
        float [M, N].
    """
    if kernel_serves(rows):
        out = torch._scaled_mm(
            rows,
            columns.t(),
            scale_a=row_scales,
            scale_b=scales,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )
        return out.to(dtype)
    products = torch.mm(rows.to(dtype), columns.to(dtype).t())
    return (products * row_scales * scales).to(dtype)


def kernel_serves(rows: Tensor) -> bool:
    """Whether these are multiplied by the kernel; `fp8_weights` refuses GPUs that lack it."""
    return rows.is_cuda
