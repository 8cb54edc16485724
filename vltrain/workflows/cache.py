"""Features of a recipe's pictures, made beforehand: `vltrain cache`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vltrain.config import Method, Recipe
from vltrain.errors import VltrainError
from vltrain.models.hub import fetch_weights
from vltrain.training.arguments import training_arguments
from vltrain.training.engines import Machine
from vltrain.training.processes import is_first
from vltrain.workflows.base import plan_engine, read_base, read_halves
from vltrain.workflows.estimate import draft
from vltrain.workflows.features import keep_features
from vltrain.workflows.prepare import prepare_model, refuse_unfit_base
from vltrain.workflows.quiet import hide_weight_bars


def cache_features(
    recipe_file: Path | None,
    *,
    method: Method | None = None,
    model: str | None = None,
    data: Sequence[Path] = (),
    overrides: Sequence[str] = (),
) -> None:
    """Compute and keep the features that a run of the recipe will read, without training.

    Processes that torchrun has started share the work.

    Args:
        recipe_file, method, model, data, overrides: as for the run, and the output may be missing;
            its `data.cache_features` counts as true.

    Raises:
        VltrainError: what would stop the run too, or features cannot be kept.
    """
    hide_weight_bars()
    console = Console(quiet=not is_first())
    recipe = _recipe(recipe_file, method, model, data, overrides)
    base = read_base(recipe.model)
    refuse_unfit_base(recipe, base.folder)
    machine = Machine.this()
    in_group = machine.grouped or recipe.needs_processes  # as the run will be
    engine = plan_engine(recipe, base, replace(machine, grouped=in_group))
    arguments = training_arguments(recipe)
    halves = read_halves(console, recipe, base, arguments)
    with arguments.main_process_first():
        fetch_weights(base.source)
    heading = f"{recipe.method} · {base.source.name} · {base.family.name}"
    console.print(Text(heading, "bold"), soft_wrap=True)
    made = prepare_model(
        recipe, base.family, base.folder, device=arguments.device, seed=arguments.seed
    )
    keep_features(console, recipe, base.family, made, halves, arguments, engine)
    console.print("done: runs of this recipe with data.cache_features: true read them")


def _recipe(
    recipe_file: Path | None,
    method: Method | None,
    model: str | None,
    data: Sequence[Path],
    overrides: Sequence[str],
) -> Recipe:
    recipe = draft(
        recipe_file, method=method, model=model, data=data, overrides=overrides, needs_data=True
    )
    if recipe.data.streaming or not recipe.freeze.vision:
        what = "records are streamed" if recipe.data.streaming else "the vision tower learns"
        raise VltrainError.at(
            str(recipe_file or "the recipe"),
            what=f"no features of its pictures can be kept: {what}",
            fix="set data.streaming: false"
            if recipe.data.streaming
            else "set freeze.vision: true, or run without features",
        )
    return replace(recipe, data=replace(recipe.data, cache_features=True))
