"""Embeddings and heads that add up their own gradients, at Qwen-VL's vocabulary on a GPU."""

import pytest
import torch
from torch import Tensor, nn

from vltrain.models.learned_vocabulary import add_in_place
from vltrain.models.loss import learned_loss

pytestmark = pytest.mark.gpu

VOCABULARY, WIDTH, TOKENS = 151_936, 1024, 600
MATRIX = VOCABULARY * WIDTH * 4  # bytes of float32


class Ends(nn.Module):
    """What a model of `transformers` has at its two ends, in float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        with torch.device("cuda"):
            self.reading = nn.Embedding(VOCABULARY, WIDTH)
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.reading

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def learn(model: Ends) -> tuple[list[Tensor], int]:
    """Loss and gradients of two batches, and the most bytes that the second took beside them."""
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (2, TOKENS), device="cuda")
    ids[:, :300] = 7
    for batch in ids:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = learned_loss(model.reading(batch[None]), model.head, batch[None], None)
        loss.backward()
    taken = torch.cuda.max_memory_allocated() - before
    return [loss.detach(), *(p.grad for p in model.parameters())], taken


def test_gradients_are_autograds_in_less_than_half_a_matrix_and_the_same_every_time():
    expected, whole = learn(Ends())
    ours = Ends()
    add_in_place(ours)

    found, taken = learn(ours)

    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0.02)
    assert whole > 1.5 * MATRIX
    assert taken < 0.5 * MATRIX
    again = Ends()
    add_in_place(again)
    assert all(torch.equal(a, b) for a, b in zip(found, learn(again)[0], strict=True))
