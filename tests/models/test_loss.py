"""The loss over learned tokens: its value, its gradient, and what it never holds."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vltrain.models.loss import ROWS, learned_loss

LABELS = torch.tensor([[-100, 2, -100, 0], [1, -100, -100, 2]])  # learned: 2 and 0, then 2


def hidden_and_head(
    tokens: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, nn.Linear]:
    torch.manual_seed(0)
    head = nn.Linear(8, 3, bias=False, dtype=dtype)
    return torch.randn(2, tokens, 8, dtype=dtype, requires_grad=True), head


def plain_loss(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    logits = head(hidden)[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


def test_a_head_that_knows_nothing_loses_the_logarithm_of_the_vocabulary():
    hidden, head = hidden_and_head()
    head.weight.data.zero_()

    assert learned_loss(hidden, head, LABELS, None).item() == pytest.approx(math.log(3))
    assert learned_loss(hidden, head, LABELS, 6).item() == pytest.approx(3 * math.log(3) / 6)
    assert learned_loss(hidden, head, LABELS, torch.tensor(6)).item() == pytest.approx(
        math.log(3) / 2
    )


@pytest.mark.parametrize("tokens", [4, 2 * ROWS + 7])
def test_loss_and_gradients_are_those_of_torchs_cross_entropy(tokens):
    hidden, head = hidden_and_head(tokens)
    labels = torch.randint(0, 3, (2, tokens))
    labels[:, ::5] = -100
    plain = plain_loss(hidden, head, labels)
    expected = torch.autograd.grad(plain, (hidden, head.weight))

    loss = learned_loss(hidden, head, labels, None)

    torch.testing.assert_close(loss, plain)
    found = torch.autograd.grad(loss, (hidden, head.weight))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_logits_in_bfloat16_are_widened_before_anything_is_added_up():
    hidden, head = hidden_and_head(dtype=torch.bfloat16)

    loss = learned_loss(hidden, head, LABELS, None)

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain_loss(hidden, head, LABELS))


def test_the_head_sees_the_places_that_predict_learned_tokens_and_no_others():
    hidden, _ = hidden_and_head()
    seen = []

    class Head(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x

    learned_loss(hidden, Head(), LABELS, None)

    assert len(seen) == 1
    assert torch.equal(seen[0], torch.stack([hidden[0, 0], hidden[0, 2], hidden[1, 2]]))


def test_a_batch_without_learned_tokens_loses_nothing_and_teaches_nothing():
    hidden, head = hidden_and_head()

    loss = learned_loss(hidden, head, torch.full_like(LABELS, -100), 5)
    loss.backward()

    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not head.weight.grad.any()


def test_a_second_backward_through_the_same_logits_is_an_error():
    hidden, head = hidden_and_head()
    loss = learned_loss(hidden, head, LABELS, None)
    loss.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
