"""How a recipe has the layers of a run: compiled or not, recomputed or not, by the memory."""

import pytest
import torch
from recipe_files import recipe_of

from vltrain.config import FreezeConfig
from vltrain.errors import VltrainError
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.catalog import QWEN_VL
from vltrain.models.census import skeleton, take_census
from vltrain.models.layer_runs import LayerRuns
from vltrain.models.qwen_vl import QwenVLConfig
from vltrain.models.sizes import Census
from vltrain.training.activations import BatchSizes, Compute
from vltrain.training.arguments import training_arguments
from vltrain.training.engines import NO_ENGINE, Engine
from vltrain.training.memory import CONTEXT_BYTES
from vltrain.training.moments import Work
from vltrain.training.optimizer_bytes import Optimizer
from vltrain.workflows import prepare
from vltrain.workflows.memory import (
    RunMemory,
    fit_layers,
    held_by_others,
    layers_of,
    ways_to_fit,
    work_of,
)
from vltrain.workflows.prepare import layer_runs_of
from vltrain.workflows.settle import settled

ZERO2, ZERO3 = (
    Engine("deepspeed", "asked for", {"zero_optimization": {"stage": stage}}) for stage in (2, 3)
)
FSDP2 = Engine("fsdp2", "asked for")


@pytest.fixture(autouse=True)
def compiler(monkeypatch) -> None:
    monkeypatch.setattr(prepare, "has_compiler", lambda: True)


def test_on_a_cpu_layers_are_left_to_transformers_where_a_recipe_says_nothing():
    recipe = settled(recipe_of(), NO_ENGINE)

    assert layer_runs_of(recipe, NO_ENGINE) is None
    assert training_arguments(recipe).to_dict()["gradient_checkpointing"] is True


@pytest.mark.parametrize(("recomputes", "kept"), [("true", 0.0), ("false", 1.0)])
def test_compiled_layers_are_recomputed_where_the_trainers_section_says_so(recomputes, kept):
    compiled = recipe_of("compile=true", f"trainer.gradient_checkpointing={recomputes}")

    assert layer_runs_of(compiled, NO_ENGINE) == LayerRuns(True, kept=kept)
    assert layer_runs_of(compiled, ZERO2) == LayerRuns(True, kept=kept)
    assert training_arguments(compiled).to_dict()["gradient_checkpointing"] is False


def test_linear_layers_that_deepspeed_replaces_are_not_compiled():
    zero = {"stage": 3, "memory_efficient_linear": True}
    engine = Engine("deepspeed", "asked for", {"zero_optimization": zero})

    with pytest.raises(VltrainError, match="memory_efficient_linear would be compiled"):
        layer_runs_of(recipe_of("compile=true"), engine)


def test_compiled_layers_of_four_bits_are_recomputed_from_outside():
    lean = recipe_of("compile=true", "memory=lean", method="qlora")

    assert layer_runs_of(lean, NO_ENGINE) == LayerRuns(True, 1)
    assert work_of(lean, training_arguments(lean), NO_ENGINE, 1).compute.recomputed(32) == 32


def test_layers_whose_weights_are_shared_out_know_it():
    for engine in (ZERO3, FSDP2):
        assert layer_runs_of(recipe_of("compile=true"), engine) == LayerRuns(
            True, kept=0.0, gathered=True
        )


def test_without_a_compiler_a_run_says_so_before_it_begins(monkeypatch):
    monkeypatch.setattr(prepare, "has_compiler", lambda: False)

    with pytest.raises(VltrainError, match="needs a C\\+\\+ compiler"):
        layer_runs_of(recipe_of("compile=true"), NO_ENGINE)


def test_settings_of_the_recomputation_that_is_replaced_are_refused():
    with pytest.raises(VltrainError, match="layers are not recomputed by transformers"):
        recipe_of("compile=true", "trainer.gradient_checkpointing_kwargs={use_reentrant: true}")


@pytest.mark.parametrize(("memory", "every"), [("fast", 0), ("lean", 1), ("auto", 0)])
def test_memory_says_what_is_recomputed_in_the_place_of_the_trainers_section(memory, every):
    settings = (f"memory={memory}", "trainer.gradient_checkpointing=false", "compile=false")

    assert layer_runs_of(recipe_of(*settings), NO_ENGINE) == LayerRuns(False, every)
    compiled = recipe_of(*settings[:-1], "compile=true")
    assert layer_runs_of(compiled, NO_ENGINE) == LayerRuns(True, kept=1.0 - every)


def test_lean_compiled_layers_are_counted_as_keeping_their_input_alone():
    lean = recipe_of("compile=true", "memory=lean")
    compute = work_of(lean, training_arguments(lean), NO_ENGINE, 1).compute

    assert compute.compiled
    assert compute == compute.all_recomputed()


def run_of(*, compiled: bool = False) -> RunMemory:
    """LoRA at the real size on 8,192 tokens."""
    config = QwenVLConfig()
    census = census_of_lora(config)
    batch = BatchSizes(rows=1, row_tokens=8192, learned_tokens=7000, pictures=4)
    compute = Compute(2, "packed", checkpointing=False, compiled=compiled)
    work = Work(compute, Optimizer("adamw_torch_fused"))
    return RunMemory(census, config.model_sizes(), batch, work)


def census_of_lora(config: QwenVLConfig) -> Census:
    model = skeleton(QWEN_VL, config, torch.bfloat16)
    adapted = add_lora(model, QWEN_VL, FreezeConfig(), Adapter(), seed=0)
    return take_census(adapted, QWEN_VL)


KEPT = [LayerRuns(False, 0), *(LayerRuns(False, every) for every in (4, 3, 2, 1))]
KEPT_COMPILED = [LayerRuns(True, 0, kept) for kept in (1.0, 0.75, 0.5, 0.0)]


@pytest.mark.parametrize(("compiled", "runs"), [(False, KEPT), (True, KEPT_COMPILED)])
def test_by_itself_a_run_recomputes_as_little_as_fits_the_gpu(compiled, runs):
    run = run_of(compiled=compiled)
    auto = recipe_of("memory=auto", f"compile={str(compiled).lower()}")
    needed = [way.estimate.comfortable for way in ways_to_fit(run)]

    assert needed == sorted(set(needed), reverse=True)
    assert [layers_of(auto, NO_ENGINE, fit_layers(run, size)) for size in needed] == runs


@pytest.mark.parametrize(
    ("compiled", "said"), [(False, "one layer in 2"), (True, "within each layer, which keeps 50%")]
)
def test_what_a_run_recomputes_by_itself_is_said(compiled, said):
    run = run_of(compiled=compiled)
    way = ways_to_fit(run)[2 if compiled else 3]
    fitted = fit_layers(run, way.estimate.comfortable)

    assert fitted.decisions == (f"recomputed on the way back: {said} (memory: auto)",)


@pytest.mark.parametrize(("compiled", "runs"), [(False, KEPT[-1]), (True, KEPT_COMPILED[-1])])
def test_a_run_that_fits_in_no_way_recomputes_every_layer(compiled, runs):
    auto = recipe_of("memory=auto", f"compile={str(compiled).lower()}")
    fitted = fit_layers(run_of(compiled=compiled), 2**30)

    assert layers_of(auto, NO_ENGINE, fitted) == runs
    assert fitted.decisions == ("recomputed on the way back: every layer (memory: auto)",)


def test_a_number_is_the_share_that_compiled_layers_keep():
    half = recipe_of("compile=true", "memory=0.5")

    assert layer_runs_of(half, NO_ENGINE) == LayerRuns(True, 0, kept=0.5)
    with pytest.raises(VltrainError, match=r"0.5 is a share of what compiled layers keep"):
        recipe_of("compile=false", "memory=0.5")


def test_by_itself_a_share_is_none_where_nothing_is_compiled():
    half = settled(recipe_of("memory=0.5"), NO_ENGINE)

    assert layer_runs_of(half, NO_ENGINE) == LayerRuns(False, 1)


def test_what_other_programs_hold_is_all_that_this_one_does_not(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 * gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * gib, 24 * gib))
    assert held_by_others() == 11 * gib - CONTEXT_BYTES

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * gib, 24 * gib))
    assert held_by_others() == 0
