"""What of a recipe, beside model and batch, decides how much memory a run takes."""

import numpy as np
import pytest
from recipe_files import recipe_of

from vltrain.config import Recipe
from vltrain.data.step_rows import StepRows
from vltrain.training.arguments import training_arguments
from vltrain.training.engines import NO_ENGINE, Engine
from vltrain.workflows import prepare
from vltrain.workflows.memory import work_of
from vltrain.workflows.run_data import Halves
from vltrain.workflows.settle import settled

IN_STEPS = ("data.packing=true", "batch.samples=4", "data.row_tokens=100", "data.max_length=50")


def accumulates(recipe: Recipe, halves: Halves | None = None) -> bool:
    recipe = settled(recipe, NO_ENGINE)
    return work_of(recipe, training_arguments(recipe), NO_ENGINE, 1, halves=halves).accumulates


class Lengths:
    """Samples of which nothing but their lengths is asked."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = np.array(lengths)

    def __len__(self) -> int:
        return len(self.lengths)


def packed(*lengths: int) -> Halves:
    samples = Lengths(*lengths)
    return Halves(samples, None, rows=StepRows(samples, step_samples=4, row_tokens=100))


def test_a_batch_that_is_a_whole_step_finds_no_gradients():
    assert not accumulates(recipe_of("trainer.gradient_accumulation_steps=1"))
    assert accumulates(recipe_of("trainer.gradient_accumulation_steps=2"))


def test_a_step_accumulates_where_its_longest_samples_do_not_fit_one_row():
    assert not accumulates(recipe_of(*IN_STEPS), packed(25, 20, 25, 25, 25, 10))
    assert accumulates(recipe_of(*IN_STEPS), packed(25, 26, 25, 25, 25, 10))


def test_without_data_the_samples_of_a_step_are_as_long_as_they_may_be():
    assert accumulates(recipe_of(*IN_STEPS))
    assert not accumulates(recipe_of(*IN_STEPS, "data.max_length=25"))


@pytest.mark.parametrize(
    ("settings", "method", "compiled"),
    [
        (("compile=false",), "lora", False),
        (("compile=false", "memory=fast"), "lora", False),
        (("compile=true",), "lora", True),
        ((), "lora", True),
        ((), "full", True),
        ((), "qlora", False),
        (("compile=true",), "qlora", False),
        (("compile=true", "memory=0.5"), "lora", True),
    ],
    ids=str,
)
def test_compiled_layers_count_as_such_but_for_those_of_4_bits(
    monkeypatch, settings: tuple[str, ...], method: str, compiled: bool
):
    monkeypatch.setattr(prepare, "has_compiler", lambda: True)
    arranged = settled(recipe_of(*settings, method=method), NO_ENGINE, on_gpu=True)

    work = work_of(arranged, training_arguments(arranged), NO_ENGINE, 1)

    assert work.compute.compiled is compiled


@pytest.mark.parametrize(("compiled", "keeps"), [("true", False), ("false", True)])
def test_linear_layers_of_zero3_keep_what_they_read_unless_compiled(monkeypatch, compiled, keeps):
    monkeypatch.setattr(prepare, "has_compiler", lambda: True)
    zero3 = Engine("deepspeed", "asked for", {"zero_optimization": {"stage": 3}})
    arranged = settled(recipe_of(f"compile={compiled}"), zero3, processes=2, on_gpu=True)

    work = work_of(arranged, training_arguments(arranged), zero3, 2)

    assert work.compute.keeps_read is keeps


@pytest.mark.parametrize(("settings", "late"), [((), False), (("data.packing=false",), True)])
def test_fsdp2_sums_the_gradients_of_a_packed_step_row_by_row(settings, late):
    fsdp2 = Engine("fsdp2", "asked for")
    recipe = recipe_of("dtype=bf16", "compile=false", *settings)
    arranged = settled(recipe, fsdp2, processes=2, on_gpu=True)

    assert work_of(arranged, training_arguments(arranged), fsdp2, 2).sharing.sums_late is late
