"""A micro-step on a GPU: nothing in it makes the host wait for what the device computes.

torch's fake tensors stand for those of a GPU: they have shapes and no values, and an operation
whose result the host would have to look at is an error. They lie on the CPU, since a torch that is
built without CUDA can fake no other; that they are a GPU's is said to what asks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny import IMAGE_START_ID, QWEN_VL_CONFIG
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensorMode,
)

from vltrain.config import FreezeConfig
from vltrain.data.collation import collate_rows
from vltrain.models import attention
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.attention import attend_packed
from vltrain.models.catalog import QWEN_VL
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration, modeling

PICTURE = [IMAGE_START_ID, *[IMAGE_START_ID + 2] * 4, IMAGE_START_ID + 1]


def adapted_model(*, dropout: float = 0.0) -> nn.Module:
    """Adapters on the language model, which attends to packed rows."""
    model = QwenVLForConditionalGeneration(QwenVLConfig.from_published(dict(QWEN_VL_CONFIG)))
    model.config.use_cache = False
    attend_packed(model)
    adapter = Adapter(r=4, dropout=dropout)
    return add_lora(model, QWEN_VL, FreezeConfig(), adapter, seed=0).train()


def batch() -> dict[str, Tensor | int]:
    """Two samples in a row, one of them with a picture."""
    seen = {"input_ids": [*PICTURE, 7, 8], "labels": [-100] * 7 + [8]}
    seen["pixel_values"] = torch.zeros(1, 3, 56, 56)
    read = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}
    return collate_rows([[seen, read]])


@contextmanager
def on_a_gpu(monkeypatch) -> Iterator[dict[str, Tensor | int]]:
    """`batch()` as if on a GPU, where all that a model computes of it is, too."""
    monkeypatch.setattr(attention, "kernel_serves", lambda device, dtype: True)
    monkeypatch.setattr(modeling, "host_would_wait", lambda device: True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    faked = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in batch().items()}
    with mode:
        yield faked


@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_and_backward_of_packed_rows_never_wait_for_the_gpu(monkeypatch, checkpointing):
    model = adapted_model(dropout=0.05)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    learned = [p for p in model.parameters() if p.requires_grad]

    with on_a_gpu(monkeypatch) as faked:
        loss = model(**faked, num_items_in_batch=3).loss
        gradients = torch.autograd.grad(loss, learned)

    assert [g.shape for g in gradients] == [p.shape for p in learned]


def test_without_what_the_collator_knows_the_host_would_have_to_look(monkeypatch):
    model = adapted_model()

    with on_a_gpu(monkeypatch) as faked, pytest.raises(DynamicOutputShapeException):
        model(**{k: v for k, v in faked.items() if k != "learned_places"})


def test_the_places_that_the_collator_names_give_the_loss_that_labels_give():
    torch.manual_seed(0)
    model, told = adapted_model(), batch()
    untold = {name: value for name, value in told.items() if name != "learned_places"}

    assert torch.equal(
        model(**told, num_items_in_batch=3).loss, model(**untold, num_items_in_batch=3).loss
    )
