"""A run whose adapters do not all learn stops at its first step."""

from pathlib import Path

import pytest
import torch
from tiny import write_qwen_vl
from transformers import TrainerControl, TrainerState, TrainingArguments

from vltrain.config import FreezeConfig
from vltrain.errors import VltrainError
from vltrain.models import load_model
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.catalog import QWEN_VL
from vltrain.training.gradient_check import AdapterGradients

IDS = torch.tensor([[*b"What?"]])


@pytest.fixture
def model(tmp_path: Path) -> torch.nn.Module:
    base = load_model(write_qwen_vl(tmp_path / "base"))
    return add_lora(base, QWEN_VL, FreezeConfig(), Adapter(r=2, dropout=0.0), seed=0).train()


def look(check: AdapterGradients, model: torch.nn.Module) -> None:
    arguments = TrainingArguments("unused", use_cpu=True, report_to="none")
    check.on_pre_optimizer_step(arguments, TrainerState(), TrainerControl(), model=model)


def test_adapters_that_all_have_a_gradient_pass(model):
    model(input_ids=IDS, labels=IDS).loss.backward()
    check = AdapterGradients()

    look(check, model)

    assert check.is_done


def test_a_layer_that_lets_no_gradient_through_is_told_by_the_adapters_below_it(model):
    # as a kernel does whose backward pass is missing
    lossy = model.get_base_model().get_submodule("transformer.h.1.mlp.c_proj")
    lossy.register_forward_hook(lambda layer, inputs, output: output.detach())
    model(input_ids=IDS, labels=IDS).loss.backward()

    with pytest.raises(VltrainError, match=r"2 of 8 adapters got no gradient(.|\n)*h\.1\.mlp\.w"):
        look(AdapterGradients(), model)


def test_a_step_without_anything_to_learn_is_no_fault_and_the_next_is_looked_at(model):
    check = AdapterGradients()

    look(check, model)

    assert not check.is_done
