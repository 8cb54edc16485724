"""The loss by its kernels on a CPU, in Triton's interpreter.

Triton looks at TRITON_INTERPRET while it is imported, so this takes a process of its own: one that
computes cases of a file (`python interpreted.py CASES RESULTS`), or pytest with it as a plugin.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from vltrain.models import loss, loss_kernels

loss.kernels_for = lambda logits: loss_kernels


def computed(logits: Tensor, targets: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """All that the kernels make of logits, whose memory holds the gradient afterwards."""
    norms, losses = loss_kernels.row_losses(logits, targets)
    loss_kernels.put_gradient(logits, targets, norms, scale)
    return {"norms": norms, "losses": losses, "gradient": logits}


if __name__ == "__main__":
    cases = torch.load(sys.argv[1])
    torch.save({name: computed(*case) for name, case in cases.items()}, sys.argv[2])
