"""Embeddings and heads that add up their own gradients, against autograd's."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from vltrain.models import learned_vocabulary
from vltrain.models.learned_vocabulary import LearnedEmbedding, LearnedHead, add_in_place

WORDS, WIDTH = 21, 6
IDS = torch.tensor([[3, 0, 3, 20], [7, 3, 0, 0]])


class Ends(nn.Module):
    """What a model of `transformers` has at its two ends."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reading = nn.Embedding(WORDS, WIDTH, dtype=dtype)
        self.head = nn.Linear(WIDTH, WORDS, bias=False, dtype=dtype)

    def get_input_embeddings(self) -> nn.Module:
        return self.reading

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.reading(ids).tanh())


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that do not divide the vocabulary evenly."""
    monkeypatch.setattr(learned_vocabulary, "HEAD_PIECE", 8)


def learn(model: Ends, *, autocast: bool = False, times: int = 2) -> list[Tensor]:
    """Logits, and the gradients that so many batches leave."""
    for shift in range(times):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model((IDS + shift) % WORDS)
        logits.float().square().sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_and_gradients_are_autograds(dtype: torch.dtype, autocast: bool):
    ours, theirs = Ends(dtype), Ends(dtype)
    add_in_place(ours)

    found, expected = learn(ours, autocast=autocast), learn(theirs, autocast=autocast)

    assert (type(ours.reading), type(ours.head)) == (LearnedEmbedding, LearnedHead)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    narrow = autocast or dtype == torch.bfloat16
    tolerance = {"atol": 0.02, "rtol": 0.02} if narrow else {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(found, expected, **tolerance)


def test_gradients_are_added_to_those_of_before_and_forgotten_as_any():
    ours, theirs = Ends(torch.float32), Ends(torch.float32)
    add_in_place(ours)
    once = [x.clone() for x in learn(ours, times=1)]

    again = learn(ours, times=1)
    ours.zero_grad()

    torch.testing.assert_close(again[1:], [2 * x for x in once[1:]])
    torch.testing.assert_close(learn(ours), learn(theirs))


def test_rows_that_no_token_is_have_no_gradient():
    model = Ends(torch.float32)
    add_in_place(model)
    learn(model, times=1)

    used = model.reading.weight.grad.abs().sum(1) > 0

    assert used.nonzero().flatten().tolist() == IDS.unique().tolist()


def test_what_rests_or_is_no_plain_matrix_is_left_to_torch():
    resting, padded = Ends(torch.float32).requires_grad_(False), Ends(torch.float32)
    padded.reading.padding_idx = 0
    padded.head = nn.Linear(WIDTH, WORDS)
    for model in (resting, padded):
        add_in_place(model)

        assert (type(model.reading), type(model.head)) == (nn.Embedding, nn.Linear)


def test_without_gradients_torch_computes():
    ours, theirs = Ends(torch.float32), Ends(torch.float32)
    add_in_place(ours)

    with torch.no_grad():
        assert torch.equal(ours(IDS), theirs(IDS))
    assert ours.reading.weight.grad is None


def test_a_batch_that_learns_nothing_has_a_gradient_of_zeros():
    model = Ends(torch.float32)
    add_in_place(model)

    model.head(torch.empty(0, WIDTH, requires_grad=True)).sum().backward()

    assert not model.head.weight.grad.any()


def test_tensors_that_are_kept_elsewhere_until_the_way_back_change_nothing():
    ours, theirs = Ends(torch.float32), Ends(torch.float32)
    add_in_place(ours)

    with torch.autograd.graph.save_on_cpu():
        ours(IDS).square().sum().backward()

    theirs(IDS).square().sum().backward()
    torch.testing.assert_close(
        [p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()]
    )


def test_adapters_of_a_head_are_left_to_peft():
    model = get_peft_model(Ends(torch.float32), LoraConfig(target_modules=["head"], r=2))
    model.get_input_embeddings = lambda: model.base_model.model.reading
    model.get_output_embeddings = lambda: model.base_model.model.head

    add_in_place(model)

    assert not [m for m in model.modules() if isinstance(m, LearnedHead | LearnedEmbedding)]
