"""GPTQ of one weight (arXiv:2210.17323), and the tensors that a packed layer is stored as.

Each weight of a row is rounded to 4 bits in turn, and what was lost is made up for in the weights
that are still to come, by how the layer's inputs go together.

Dimension letters: `N` outputs, `K` inputs, `G` groups of inputs that share a scale, `M` tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = 4
GROUP_SIZE = 128
DAMP = 0.01  # of the mean of the diagonal, added to it
DAMPS = (DAMP, 0.1, 1.0)  # the next one where a matrix cannot be decomposed with one
LARGEST = 2**BITS - 1
ZERO = 2 ** (BITS - 1)  # the code of 0, where codes are symmetric
PER_WORD = 32 // BITS  # codes in an int32


@dataclass(frozen=True)
class Codes:
    """A weight as numbers of 4 bits and their scales."""

    codes: Tensor  # uint8 [N, K], 0 to 15
    scales: Tensor  # float16 [N, G]

    def weight(self) -> Tensor:
        """The weight that they stand for, float32 [N, K]."""
        groups = self.codes.size(1) // self.scales.size(1)
        scales = self.scales.float().repeat_interleave(groups, dim=1)
        return (self.codes.float() - ZERO) * scales

    def tensors(self, bias: Tensor) -> dict[str, Tensor]:
        """A packed layer's tensors on the CPU, as Qwen-VL-Chat-Int4 is published.

        Args:
            bias: float [N]; zeros where the plain layer has none.

        Returns:
            `qweight` int32 [K / 8, N], `qzeros` int32 [G, N / 8] with each zero less one,
            `scales` float16 [G, N], `g_idx` int32 [K], and `bias`.
        """
        outputs, inputs = self.codes.shape
        groups = self.scales.size(1)
        zeros = torch.full((groups, outputs), ZERO - 1, dtype=torch.uint8)
        return {
            "qweight": packed(self.codes).T.contiguous().cpu(),
            "qzeros": packed(zeros),
            "scales": self.scales.T.contiguous().cpu(),
            "g_idx": (torch.arange(inputs) // (inputs // groups)).int(),
            "bias": bias.detach().cpu().contiguous(),
        }


def packed(codes: Tensor) -> Tensor:
    """Codes uint8 [R, C] as int32 [R, C / 8], eight in each number, the first one lowest."""
    eights = codes.to(torch.int64).unflatten(1, (-1, PER_WORD))
    words = (eights << torch.arange(0, 32, BITS, device=codes.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


class InputMoments:
    """How a layer's inputs go together: the Hessian of its squared error, but for a factor."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.sum = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Count inputs, float [..., K]."""
        rows = x.reshape(-1, x.size(-1)).to(self.sum.device, torch.float32)
        self.sum.addmm_(rows.T, rows)
        self.tokens += rows.size(0)

    def mean(self) -> Tensor:
        """float32 [K, K].

        Raises:
            ValueError: an input was NaN or infinite.
        """
        mean = self.sum / max(self.tokens, 1)
        if not mean.isfinite().all():
            raise ValueError("inputs are NaN or infinite")
        return mean


def scales_of(weight: Tensor) -> Tensor:
    """The scale of each row's codes, float16 [N, 1]: symmetric, so that no weight leaves them.

    Args:
        weight: float32 [N, columns], of one group.
    """
    largest = weight.abs().amax(dim=1, keepdim=True)
    scales = (2 * largest / LARGEST).half()
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def nearest(weight: Tensor, scales: Tensor) -> Tensor:
    """The levels, whole numbers around 0, that lie nearest to weights; both float32 [N, columns].

    Args:
        scales: float32 [N, 1], of one level.
    """
    return (weight / scales).round_().clamp_(-ZERO, LARGEST - ZERO)


def codes_of(levels: Tensor) -> Tensor:
    """The codes, uint8, that levels are written as."""
    return (levels + ZERO).to(torch.uint8)


def round_to_nearest(weight: Tensor, group_size: int = GROUP_SIZE) -> Codes:
    """A weight float [N, K] rounded, each number by itself: what GPTQ is held against."""
    groups = weight.float().split(group_size, dim=1)
    scales = [scales_of(group) for group in groups]
    levels = [nearest(group, s.float()) for group, s in zip(groups, scales, strict=True)]
    codes = [codes_of(group) for group in levels]
    return Codes(torch.cat(codes, dim=1), torch.cat(scales, dim=1))


def solve(weight: Tensor, moments: Tensor, group_size: int = GROUP_SIZE) -> Codes:
    """A weight in 4 bits whose outputs are near to its own.

    Args:
        weight: float [N, K]; K is divisible by `group_size`.
        moments: float32 [K, K], see `InputMoments.mean`.
        group_size: inputs that share a scale; it is taken of the weights as they are when the
            first of the group is rounded.

    Raises:
        ValueError: a weight is NaN or infinite, or the moments cannot be decomposed.
    """
    if not weight.isfinite().all():
        raise ValueError("weights are NaN or infinite")
    left = weight.float().clone()
    unused = moments.diagonal() == 0
    left[:, unused] = 0
    factor = _inverse_factor(moments, unused)
    all_codes, all_scales = [], []
    for start in range(0, left.size(1), group_size):
        end = start + group_size
        group = left[:, start:end].clone()  # its columns lie close to each other
        rows = factor[start:end] / factor.diagonal()[start:end, None]
        scales = scales_of(group)
        wide = scales.float()
        levels, lost = torch.empty_like(group), torch.empty_like(group)
        for place in range(group.size(1)):  # few operations: on a GPU their number is the time
            column = group[:, place : place + 1]
            level = nearest(column, wide)
            gone = torch.addcmul(column, level, wide, value=-1)
            levels[:, place : place + 1] = level
            lost[:, place : place + 1] = gone
            group[:, place:].addcmul_(gone, rows[place, start + place : end], value=-1)
        left[:, end:] -= lost @ rows[:, end:]
        all_codes.append(codes_of(levels))
        all_scales.append(scales)
    return Codes(torch.cat(all_codes, dim=1), torch.cat(all_scales, dim=1))


def _inverse_factor(moments: Tensor, unused: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of moments, damped, float32 [K, K].

    Raises:
        ValueError: it has none.
    """
    diagonal = moments.diagonal()
    for damp in DAMPS:
        damped = moments.clone()
        damped.diagonal().add_(damp * diagonal.mean() + unused.float())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and upper.isfinite().all():
            return upper
    raise ValueError("the inputs' moments cannot be decomposed")


def output_error(weight: Tensor, kept: Tensor, moments: Tensor) -> float:
    """How far outputs of another weight are from those of a weight, as a share of their size.

    Args:
        weight, kept: float32 [N, K].
        moments: float32 [K, K], of the inputs.
    """
    lost = weight - kept
    ratio = ((lost @ moments) * lost).sum() / ((weight @ moments) * weight).sum()
    return float(ratio.clamp(min=0).sqrt())
