"""The kernels of the loss on a GPU, at Qwen-VL's vocabulary, beside torch's own operations."""

import pytest
import torch
from torch import Tensor

from vltrain.models import loss
from vltrain.models.loss import SummedCrossEntropy, learned_loss

pytestmark = pytest.mark.gpu

VOCABULARY = 151_936
SCALE = 1 / 300


def random_logits(rows: int, dtype: torch.dtype, *, apart: int = 0) -> tuple[Tensor, Tensor]:
    """Logits whose rows have so many numbers between them, and targets."""
    torch.manual_seed(0)
    memory = torch.randn(rows, VOCABULARY + apart, device="cuda", dtype=dtype) * 3
    targets = torch.randint(VOCABULARY, (rows,), device="cuda")
    return memory[:, :VOCABULARY].requires_grad_(), targets


def loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of a copy, for the gradient takes its place."""
    seen = torch.empty_strided(
        logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device
    )
    seen.copy_(logits.detach()).requires_grad_()
    total = SummedCrossEntropy.apply(seen, targets)
    return total, torch.autograd.grad(total * SCALE, seen)[0]


@pytest.mark.parametrize("apart", [0, 3, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_give_what_torchs_own_operations_give(dtype, apart, monkeypatch):
    logits, targets = random_logits(300, dtype, apart=apart)
    assert loss.kernels_for(logits) is not None
    by_kernels = loss_and_gradient(logits, targets)
    monkeypatch.setattr(loss, "kernels_for", lambda logits: None)

    by_torch = loss_and_gradient(logits, targets)

    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(by_kernels[0], by_torch[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(by_kernels[1], by_torch[1], rtol=rounding, atol=1e-7)


def test_rows_behind_the_reach_of_32_bits_have_their_own_losses_and_gradients():
    rows = 2**31 // VOCABULARY + 100
    if torch.cuda.mem_get_info()[0] < 3 * rows * VOCABULARY:
        pytest.skip("the GPU has no room for logits of more than 4 GiB")
    logits = torch.zeros(rows, VOCABULARY, device="cuda", dtype=torch.bfloat16)
    last, targets = random_logits(50, torch.bfloat16)
    logits[-50:] = last.detach()
    all_targets = torch.zeros(rows, device="cuda", dtype=torch.int64)
    all_targets[-50:] = targets
    kernels = loss.kernels_for(logits)

    norms, losses = kernels.row_losses(logits, all_targets)
    kernels.put_gradient(logits, all_targets, norms, torch.ones((), device="cuda"))

    expected_norms, expected_losses = kernels.row_losses(last.detach(), targets)
    kernels.put_gradient(last.detach(), targets, expected_norms, torch.ones((), device="cuda"))
    assert torch.equal(losses[-50:], expected_losses)
    assert torch.equal(logits[-50:], last)


def test_the_host_waits_for_nothing_and_other_rows_compile_nothing(monkeypatch):
    triton = pytest.importorskip("triton")
    loss_and_gradient(*random_logits(3, torch.bfloat16))
    batches = [random_logits(rows, torch.bfloat16) for rows in (1, 0, 16, 301)]
    compiled = []
    hook = lambda **what: compiled.append(what)  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [loss_and_gradient(*batch) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert [gradient.size(0) for _, gradient in found] == [1, 0, 16, 301]
    assert found[1][0].item() == 0
    assert compiled == []


def test_the_loss_of_a_head_under_autocast_is_backpropagated_once(monkeypatch):
    torch.manual_seed(0)
    head = torch.nn.Linear(64, VOCABULARY, bias=False, device="cuda")
    hidden = torch.randn(1, 40, 64, device="cuda", requires_grad=True)
    labels = torch.randint(VOCABULARY, (1, 40), device="cuda")

    def results() -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16):
            total = learned_loss(hidden, head, labels, 39)
        gradients = torch.autograd.grad(total, (hidden, head.weight), retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
        return total, *gradients

    by_kernels = results()
    monkeypatch.setattr(loss, "kernels_for", lambda logits: None)

    for ours, torchs in zip(by_kernels, results(), strict=True):
        assert (ours - torchs).norm() <= 0.005 * torchs.norm()
