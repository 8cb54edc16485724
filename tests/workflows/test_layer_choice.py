"""How a recipe has the layers of a run: compiled or not, recomputed or not."""

from pathlib import Path

import pytest

from vltrain.config import Recipe, load_recipe
from vltrain.errors import VltrainError
from vltrain.models.layer_runs import LayerRuns
from vltrain.training.arguments import training_arguments
from vltrain.training.engines import NO_ENGINE, Engine
from vltrain.workflows import prepare
from vltrain.workflows.prepare import layer_runs_of

ZERO2, ZERO3 = (
    Engine("deepspeed", "asked for", {"zero_optimization": {"stage": stage}}) for stage in (2, 3)
)


def recipe(*overrides: str, method: str = "lora") -> Recipe:
    return load_recipe(
        None,
        method=method,
        model="base",
        data=[Path("a.json")],
        output=Path("out"),
        overrides=overrides,
    )


@pytest.fixture(autouse=True)
def compiler(monkeypatch) -> None:
    monkeypatch.setattr(prepare, "has_compiler", lambda: True)


def test_where_a_recipe_says_nothing_layers_are_left_to_transformers():
    assert layer_runs_of(recipe(), NO_ENGINE) is None
    assert training_arguments(recipe()).to_dict()["gradient_checkpointing"] is True


@pytest.mark.parametrize(("recomputes", "every"), [("true", 1), ("false", 0)])
def test_compiled_layers_are_recomputed_where_the_trainers_section_says_so(recomputes, every):
    compiled = recipe("compile=true", f"trainer.gradient_checkpointing={recomputes}")

    assert layer_runs_of(compiled, NO_ENGINE) == LayerRuns(True, every)
    assert layer_runs_of(compiled, ZERO2) == LayerRuns(True, every)
    assert training_arguments(compiled).to_dict()["gradient_checkpointing"] is False


def test_by_itself_a_run_compiles_on_a_gpu_alone(monkeypatch):
    auto = recipe("compile=auto")
    assert layer_runs_of(auto, NO_ENGINE) == LayerRuns(False, 1)

    monkeypatch.setattr(prepare.torch.cuda, "is_available", lambda: True)

    assert layer_runs_of(auto, NO_ENGINE).compiled
    assert not layer_runs_of(auto, ZERO3).compiled
    assert not layer_runs_of(recipe("compile=auto", method="qlora"), NO_ENGINE).compiled


def test_layers_whose_weights_are_shared_out_are_not_compiled():
    with pytest.raises(VltrainError, match="gathers weights within the layers"):
        layer_runs_of(recipe("compile=true"), ZERO3)


def test_without_a_compiler_a_run_says_so_before_it_begins(monkeypatch):
    monkeypatch.setattr(prepare, "has_compiler", lambda: False)

    with pytest.raises(VltrainError, match="needs a C\\+\\+ compiler"):
        layer_runs_of(recipe("compile=true"), NO_ENGINE)


def test_settings_of_the_recomputation_that_is_replaced_are_refused():
    with pytest.raises(VltrainError, match="layers are not recomputed by transformers"):
        recipe("compile=true", "trainer.gradient_checkpointing_kwargs={use_reentrant: true}")
