"""How layers are run: compiled, recomputed or plain, they teach the same."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import IMAGE_START_ID, QWEN_VL_CONFIG
from torch import Tensor, nn
from torch._dynamo.utils import counters
from varlen_on_cpu import serve_on_cpu

from vltrain.config import FreezeConfig
from vltrain.data.collation import collate_rows
from vltrain.models import attention
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.attention import attend_packed
from vltrain.models.catalog import QWEN_VL
from vltrain.models.layer_runs import LayerRuns, arrange_layers, stacks_of
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration

PICTURE = [IMAGE_START_ID, *[IMAGE_START_ID + 2] * 4, IMAGE_START_ID + 1]
LAYERS = 3
pytestmark = pytest.mark.usefixtures("compilations")
COMPILED = LayerRuns(compiled=True, backend="aot_eager")
LEAN = LayerRuns(compiled=True, kept=0.0, backend="aot_eager_decomp_partition")


@pytest.fixture
def kernel(monkeypatch) -> None:
    """Packed rows are attended to as on a GPU."""
    serve_on_cpu()
    monkeypatch.setattr(attention, "kernel_serves", lambda device, dtype: True)


def adapted_model(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = QwenVLConfig.from_published(QWEN_VL_CONFIG | {"num_hidden_layers": LAYERS})
    model = QwenVLForConditionalGeneration(config)
    model.config.use_cache = False
    attend_packed(model)
    adapted = add_lora(model, QWEN_VL, FreezeConfig(), Adapter(r=4, dropout=dropout), seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros, which would leave the first matrices without gradients
            nn.init.normal_(parameter, std=0.1)
    return adapted.train()


def row(*texts: int) -> dict[str, Tensor | int]:
    """A packed row of samples with a picture and so many tokens of text."""
    torch.manual_seed(sum(texts))
    samples = []
    for text in texts:
        ids = [*PICTURE, *torch.randint(0, 250, (text,)).tolist()]
        labels = [-100] * len(PICTURE) + ids[len(PICTURE) :]
        pixels = torch.randn(1, 3, 56, 56)
        samples.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    return collate_rows([samples])


def learn(model: nn.Module, *texts: int) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of a row."""
    torch.manual_seed(7)  # of dropout
    loss = model(**row(*texts), num_items_in_batch=10).loss
    return loss.detach(), list(
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    )


@pytest.mark.parametrize(
    ("runs", "recomputed"),
    [
        (LayerRuns(), 0),
        (LayerRuns(recompute_every=1), LAYERS),
        (LayerRuns(recompute_every=2), 2),
        (LayerRuns(recompute_every=3), 1),
    ],
)
def test_layers_that_are_recomputed_teach_what_they_teach_as_they_are(runs, recomputed):
    model = adapted_model(dropout=0.1)
    expected = learn(model, 5, 3)
    calls: list[int] = []
    for block in (layer.mlp for layer in model.get_base_model().transformer.h):
        block.register_forward_pre_hook(lambda *_: calls.append(1))

    arrange_layers(model, runs)

    torch.testing.assert_close(learn(model, 5, 3), expected)
    assert len(calls) == LAYERS + recomputed


def test_a_frozen_tower_is_never_recomputed():
    model = adapted_model()
    calls: list[int] = []
    blocks = model.get_base_model().transformer.visual.transformer.resblocks
    blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    arrange_layers(model, LayerRuns(recompute_every=1))
    learn(model, 5, 3)

    assert calls == [1]


@pytest.mark.slow
@pytest.mark.parametrize("runs", [COMPILED, replace(COMPILED, recompute_every=1), LEAN])
def test_compiled_layers_teach_what_plain_ones_teach(kernel, runs):
    model = adapted_model()
    expected = learn(model, 5, 3)

    arrange_layers(model, runs)

    torch.testing.assert_close(learn(model, 5, 3), expected, rtol=1e-5, atol=1e-6)
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "recompute_every"),
    [
        (1.0, 0),
        (0.5, 0),
        pytest.param(0.0, 0, marks=pytest.mark.matrix),
        pytest.param(1.0, 1, marks=pytest.mark.matrix),
        pytest.param(0.5, 2, marks=pytest.mark.matrix),
    ],
)
def test_gradients_of_compiled_layers_are_those_of_the_mask_that_made_the_loss(
    kernel, kept, recompute_every
):
    model = adapted_model(dropout=0.5)
    partitioned = "aot_eager_decomp_partition"
    arrange_layers(model, LayerRuns(True, recompute_every, kept, partitioned))
    _, gradients = learn(model, 5, 3)
    learned = [p for p in model.parameters() if p.requires_grad]
    ways = [torch.randn_like(p) for p in learned]
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, way in zip(learned, ways, strict=True):
                parameter.add_(way, alpha=sign * 1e-3)
            torch.manual_seed(7)
            sides.append(model(**row(5, 3), num_items_in_batch=10).loss.item())
            for parameter, way in zip(learned, ways, strict=True):
                parameter.sub_(way, alpha=sign * 1e-3)

    slope = sum((g * w).sum().item() for g, w in zip(gradients, ways, strict=True))
    assert (sides[0] - sides[1]) / 2e-3 == pytest.approx(slope, rel=0.01)


@pytest.mark.slow
@pytest.mark.matrix
def test_with_dropout_compiled_layers_teach_the_same_whatever_they_keep(kernel):
    model = adapted_model(dropout=0.5)
    arrange_layers(model, LayerRuns(compiled=True, backend="eager"))  # autograd's own way back
    expected = [learn(model, *texts) for texts in ((5, 3), (2, 30, 4))]

    for share in (1.0, 0.5, 0.0):
        arrange_layers(model, replace(LEAN, kept=share))
        found = [learn(model, *texts) for texts in ((5, 3), (2, 30, 4))]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("runs", [COMPILED, LEAN])
def test_other_lengths_and_numbers_of_samples_compile_nothing_more(kernel, runs):
    model = adapted_model(dropout=0.1)
    arrange_layers(model, runs)
    learn(model, 5, 3)
    learn(model, 5)
    warm = counters["stats"]["unique_graphs"]

    for texts in ((9,), (2, 30, 4), (11, 12), (1, 1, 1, 1, 1, 1), (5, 3)):
        learn(model, *texts)

    assert 0 < warm <= 3, "the layers; the tower, for a picture and for more"
    assert counters["stats"]["unique_graphs"] == warm


@pytest.mark.slow
def test_compiled_layers_keep_the_share_that_they_are_given_and_teach_the_same(kernel):
    model = adapted_model()
    expected = learn(model, 5, 3)
    kept: list[int] = []
    for share in (1.0, 0.3, 0.0):
        partitioned = "aot_eager_decomp_partition"
        arrange_layers(model, LayerRuns(compiled=True, kept=share, backend=partitioned))
        sizes: list[int] = []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(0 if isinstance(tensor, nn.Parameter) else tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            found = learn(model, 5, 3)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        kept.append(sum(sizes))

    assert kept[1] < 0.85 * kept[0]
    assert kept[2] < 0.85 * kept[1]


def test_in_evaluation_layers_run_as_they_are():
    model = adapted_model().eval()
    expected = model(**row(5, 3)).logits
    arrange_layers(model, LayerRuns(compiled=True, recompute_every=1, backend="no such one"))

    assert torch.equal(model(**row(5, 3)).logits, expected)


def test_an_arrangement_is_undone_by_the_next():
    model = adapted_model()
    arrange_layers(model, LayerRuns(compiled=True, backend="no such one"))

    arrange_layers(model, LayerRuns())

    assert all("forward" not in vars(layer) for stack in stacks_of(model) for layer in stack)


def test_a_copy_of_a_model_runs_its_own_layers():
    model = adapted_model()
    arrange_layers(model, LayerRuns(recompute_every=1))
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()

    assert not learn(other, 5, 3)[0].isclose(learn(model, 5, 3)[0])
